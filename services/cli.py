"""The command `vitrine`."""

import argparse
import asyncio
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services import runtime
from services.errors import FailedPrecondition, InvalidArgument, VitrineError
from services.settings import Settings

_BY = "scenario, bundle, arm, day, channel, position, band or source"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when it did what was asked, 1 with a line on stderr when it could not."""
    runtime.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_worth_reading)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that libraries draw while they load weights
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        run(options)
    except VitrineError as error:
        print(f"vitrine: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    return 0


def _worth_reading(record: logging.LogRecord) -> bool:
    # open_clip writes a dozen lines to the root logger for every model it opens.
    return record.name != "root" or record.levelno >= logging.WARNING


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitrine", description="A recommender that shops run themselves.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the services",
        description="Run all three services in this process, or one of them.",
    )
    serve.add_argument("service", nargs="?", choices=("embedding", "ranking", "gateway"))
    for name, field in Settings.model_fields.items():
        required = field.is_required() and f"VITRINE_{name.upper()}" not in os.environ
        flag = f"--{name.replace('_', '-')}"
        serve.add_argument(flag, dest=name, help=field.description, required=required)
    serve.set_defaults(run=_serve)
    _add_train(commands)
    _add_evaluate(commands)
    _add_import(commands)
    _add_analyze(commands)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the shop directory")
    parser.add_argument("--shop", type=Path, help="its shop.toml, when that lies elsewhere")


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="turn a shop directory into a bundle")
    _add_data(train)
    train.add_argument("--out", type=Path, required=True, help="the directory of bundles")
    train.add_argument("--until", type=_moment, help="use only events before this date or time")
    train.add_argument(
        "--training", type=Path, help="a file whose keys replace shop.toml's: less training, or more"
    )
    train.add_argument(
        "--text-base", help="a Hugging Face BERT, hub name or directory, in place of shop.toml's"
    )
    train.add_argument("--image-base", help="an open_clip model:tag or directory, in place of shop.toml's")
    train.add_argument(
        "--unjudged",
        action="store_true",
        help="do not ask past baskets what the bundle and its parts are worth, a dozen fits",
    )
    train.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="answer a split's queries through the serving path")
    _add_data(evaluate)
    evaluate.add_argument("--bundle", type=Path, required=True, help="a bundle, or a directory of them")
    evaluate.add_argument("--split", choices=("val", "test"), required=True)
    evaluate.add_argument("--out", type=Path, required=True, help="the run, a line of JSON per query")
    evaluate.add_argument("--limit", type=int, default=0, help="only the first queries; 0 means all")
    evaluate.add_argument("--reverse", action="store_true", help="answer the last query first")
    evaluate.add_argument(
        "--unfiltered", action="store_true", help="rank the whole catalogue, without shop.toml's task.filter"
    )
    evaluate.add_argument("--over-grpc", type=int, default=200, help="queries compared over gRPC; 0 for none")
    evaluate.set_defaults(run=_evaluate)


def _add_import(commands: Any) -> None:
    load = commands.add_parser("import", help="load a shop's events into a state that is not served now")
    _add_data(load)
    load.add_argument("--bundle", type=Path, required=True, help="the bundle that will be served")
    load.add_argument("--state", type=Path, required=True, help="the state directory")
    load.add_argument("--until", type=_moment, help="only events before this date or time")
    load.set_defaults(run=_import)


def _add_analyze(commands: Any) -> None:
    analyze = commands.add_parser("analyze", help="tell what pages led to, from the events of a state")
    analyze.add_argument("--state", type=Path, required=True, help="the state directory, served or not")
    what = analyze.add_mutually_exclusive_group()
    what.add_argument("--by", default="scenario", help=_BY)
    analyze.add_argument("--since", type=_moment, help="only events from this date or time on")
    analyze.add_argument("--until", type=_moment, help="only events before this date or time")
    analyze.add_argument("--shown-as", default="impression", help="the event type of impressions")
    analyze.add_argument("--bought-as", default="purchase", help="the event type whose prices are revenue")
    analyze.add_argument(
        "--ranking-database", default="", help="SQLAlchemy URL; empty means SQLite under state"
    )
    analyze.add_argument("--secret", default="", help="what signs tokens; empty means the one kept in state")
    what.add_argument("--experiment", default="", help="the name of one: compare its arms")
    what.add_argument(
        "--policies", action="store_true", help="estimate what other ways to explore would have led to"
    )
    analyze.add_argument(
        "--on", default="click", help="the event type that --experiment and --policies count"
    )
    analyze.add_argument("--json", action="store_true", help="print JSON")
    analyze.set_defaults(run=_analyze)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date or time, such as 2026-11-26") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _train(options: dict[str, Any]) -> None:
    from training.pipeline import train

    shop_file = options.pop("shop")
    bundle = train(options.pop("data"), options.pop("out"), shop_file=shop_file, **options)
    print(bundle)  # noqa: T201 - a command's answer


def _evaluate(options: dict[str, Any]) -> None:
    from services.replay import evaluate

    required = [options.pop(name) for name in ("data", "bundle", "split", "out")]
    evaluate(*required, shop_file=options.pop("shop"), **options)


def _import(options: dict[str, Any]) -> None:
    from services.bundle import Bundle
    from services.replay import import_events
    from training.dataset import read_shop

    bundle = Bundle(options["bundle"])
    shop = read_shop(options["data"], options["shop"], options["until"])
    settings = Settings(bundle=bundle.directory, state=options["state"])
    print(f"{import_events(settings, bundle, shop)} events imported")  # noqa: T201


def _analyze(options: dict[str, Any]) -> None:
    from services import store

    state, url, secret = (options.pop(name) for name in ("state", "ranking_database", "secret"))
    kept = [state / "ranking.sqlite", state / "secret"]
    for path, given in zip(kept, (url, secret), strict=True):
        if not given and not path.is_file():
            raise FailedPrecondition(f"{path} is not there: is {state} the state of a ranking service?")
    engine = store.open_engine(url or f"sqlite:///{kept[0].absolute()}")
    try:
        _told_of(engine, secret.encode() or kept[1].read_bytes(), options)
    finally:
        engine.dispose()


def _told_of(engine: Any, secret: bytes, options: dict[str, Any]) -> None:
    from services.analysis import command

    by, as_json = options.pop("by"), options.pop("json")
    experiment, policies, on = options.pop("experiment"), options.pop("policies"), options.pop("on")
    span = options["since"], options["until"]
    if all(span) and span[0] >= span[1]:
        raise InvalidArgument.of("since", "is not before until")
    asked = {"on": on} if experiment or policies else {"shown_as": options["shown_as"]}
    command.check_types(engine, asked)
    if experiment:
        told = command.of_experiment(engine, secret, experiment, on, *span, options["bought_as"])
    elif policies:
        told = command.of_policies(engine, secret, on, *span)
    else:
        told = command.of_traffic(engine, secret, by, **options)
    command.show(told, as_json=as_json)


def _serve(options: dict[str, Any]) -> None:
    from services import heap, wiring
    from services.generation import ALL
    from services.server import until_told_to_stop

    heap.own()
    service = options.pop("service")
    settings = Settings(**{name: value for name, value in options.items() if value is not None})

    async def run() -> None:
        hosted = (service,) if service else ALL
        app = wiring.App(settings, hosted, await wiring.first_bundle(settings, hosted))
        await app.start()
        logging.getLogger("vitrine").info("bundle %s is served on port %d", app.bundle.version, app.port)
        await until_told_to_stop()
        await app.stop()

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
