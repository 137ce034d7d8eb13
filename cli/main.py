"""The command `vitrine`."""

import argparse
import asyncio
import logging
import os
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from services.core import command_errors, native_threads
from services.core.errors import FailedPrecondition, InvalidArgument
from services.serving.settings import Settings, settings_of

_TRAINING_INTERRUPTED = (
    "interrupted: no bundle was published; the finished stages are in .stages under the directory of "
    "bundles, and the same command continues from there"
)
# Static, since the table of presets imports pyarrow, which `vitrine serve` never needs.
_PRESET_HELP = (
    "the system that wrote the files, such as shopify; docs/shop-files.md lists them, as does a wrong name"
)
_BY = "scenario, bundle, arm, day, channel, position, band or source"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code, one of `command_errors`."""
    native_threads.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_worth_logging)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries draw progress bars while they load weights
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    if options.pop("traceback"):
        os.environ[command_errors.TRACEBACK_VARIABLE] = "1"
    return command_errors.run(partial(run, options), options.pop("interrupted", "interrupted"))


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # open_clip logs a dozen lines to the root logger for every model that it opens, and FAISS one for each
    # instruction set that it was not built for.
    return record.name not in {"root", "faiss.loader"} or record.levelno >= logging.WARNING


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitrine",
        description="A recommender that shops run themselves.",
        epilog=command_errors.EXIT_CODES,
    )
    parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error")
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
    serve.set_defaults(run=_serve, interrupted="stopped before the services were ready")
    _add_train(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    _add_import(commands)
    _add_import_shop(commands)
    _add_sync(commands)
    _add_analyze(commands)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="the shop directory")
    parser.add_argument("--shop", type=Path, help="its shop.toml, if that is in another place")


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="turn a shop directory into a bundle")
    _add_data(train)
    train.add_argument("--out", type=Path, required=True, help="the directory of bundles")
    train.add_argument("--until", type=_parse_time, help="use only events before this date or time")
    train.add_argument(
        "--training-config",
        type=Path,
        help="a TOML file whose keys replace those of shop.toml",
    )
    train.add_argument(
        "--text-base", help="a Hugging Face BERT, hub name or directory, in place of shop.toml's"
    )
    train.add_argument(
        "--image-base",
        help='"efficientnet-lite0", timm:NAME, "small", an open_clip model:tag, or a directory, in place of '
        "shop.toml's",
    )
    train.add_argument(
        "--skip-evaluation",
        action="store_true",
        help="skip the evaluation of the bundle and its parts on past baskets, which takes a dozen fits",
    )
    _add_losses(train)
    train.set_defaults(run=_train, interrupted=_TRAINING_INTERRUPTED)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show how a shop directory is read, and whether training would refuse it",
        description="Read a shop directory without training. Exit status 1 when training would refuse it.",
    )
    _add_data(inspect)
    inspect.add_argument("--until", type=_parse_time, help="use only events before this date or time")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)


def _add_losses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-losses",
        action="store_true",
        help="continue even if most rows, prices or events of the files are lost",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a bundle on held-out baskets, next to simple methods",
        description="Answer past queries through the serving path, and print recall, nDCG and hit rate with "
        "intervals, next to popular items, the cosine of items in histories, and EASE on the same queries.",
    )
    _add_data(evaluate)
    evaluate.add_argument("--bundle", type=Path, required=True, help="a bundle, or a directory of them")
    evaluate.add_argument(
        "--split",
        choices=("val", "test"),
        help="the queries that shop.toml names; without it, the baskets after the bundle's --until",
    )
    evaluate.add_argument("--out", type=Path, help="write the pages there, a line of JSON per query")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--limit", type=int, default=0, help="only so many queries; 0 means all, or 1,000 without --split"
    )
    evaluate.add_argument("--reverse", action="store_true", help="answer the last query first")
    evaluate.add_argument(
        "--unfiltered", action="store_true", help="rank the whole catalog, without shop.toml's task.filter"
    )
    evaluate.add_argument(
        "--over-grpc", type=int, default=200, help="the number of queries to compare over gRPC; 0 for none"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_import(commands: Any) -> None:
    load = commands.add_parser("import", help="load a shop's events into a state that no process serves")
    _add_data(load)
    load.add_argument("--bundle", type=Path, required=True, help="the bundle that will be served")
    load.add_argument("--state", type=Path, required=True, help="the state directory")
    load.add_argument("--until", type=_parse_time, help="only events before this date or time")
    _add_losses(load)
    load.set_defaults(run=_import)


def _add_import_shop(commands: Any) -> None:
    convert = commands.add_parser(
        "import-shop", help="turn an export of a known shop system into a shop directory"
    )
    convert.add_argument("--from", dest="preset", required=True, metavar="SYSTEM", help=_PRESET_HELP)
    convert.add_argument("--data", type=Path, required=True, help="the directory of the exported files")
    convert.add_argument("--out", type=Path, required=True, help="the shop directory to write")
    convert.set_defaults(run=_import_shop)


def _add_sync(commands: Any) -> None:
    sync = commands.add_parser(
        "sync",
        help="make a running service serve a catalog file: write changed items, delete missing ones",
        description="Compares a catalog file with the served items and shows the difference. Writes it with "
        "--apply. The file wins for every item, whoever wrote it last.",
    )
    source = sync.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="the shop directory")
    source.add_argument("--items", type=Path, help="the items file; shop.toml and images/ are next to it")
    sync.add_argument("--shop", type=Path, help="the shop.toml, if it is in another place")
    sync.add_argument("--server", default="127.0.0.1:50051", help="host:port of the gateway")
    sync.add_argument("--apply", action="store_true", help="write the difference")
    sync.add_argument(
        "--max-deletions",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="the share of the served items that may be deleted at once",
    )
    _add_losses(sync)
    sync.set_defaults(run=_sync)


def _add_analyze(commands: Any) -> None:
    analyze = commands.add_parser(
        "analyze", help="report what impressions led to, from the events of a state"
    )
    analyze.add_argument("--state", type=Path, required=True, help="the state directory, served or not")
    report = analyze.add_mutually_exclusive_group()
    report.add_argument("--by", default="scenario", help=_BY)
    analyze.add_argument("--since", type=_parse_time, help="only events from this date or time on")
    analyze.add_argument("--until", type=_parse_time, help="only events before this date or time")
    analyze.add_argument("--impression-type", default="impression", help="the event type of impressions")
    analyze.add_argument(
        "--purchase-type", default="purchase", help="the event type whose prices are revenue"
    )
    analyze.add_argument(
        "--ranking-database", default="", help="SQLAlchemy URL; empty means SQLite under state"
    )
    analyze.add_argument(
        "--secret",
        default="",
        help="the secret that signs tokens; empty means the one in the state directory",
    )
    report.add_argument("--experiment", default="", help="the name of an experiment: compare its arms")
    report.add_argument(
        "--off-policy",
        action="store_true",
        help="estimate the results of other exploration policies",
    )
    analyze.add_argument(
        "--goal", default="click", help="the event type that --experiment and --off-policy count"
    )
    analyze.add_argument("--json", action="store_true", help="print JSON")
    analyze.set_defaults(run=_analyze)


def _parse_time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date or time, such as 2026-11-26") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _train(options: dict[str, Any]) -> None:
    _require_directory(options["data"])
    from training.pipeline import train

    shop_file = options.pop("shop")
    bundle, lines = train(options.pop("data"), options.pop("out"), shop_file=shop_file, **options)
    print(*lines, sep="\n", file=sys.stderr)  # noqa: T201 - for the reader; the answer is the bundle
    print(bundle)  # noqa: T201 - a command's answer


def _inspect(options: dict[str, Any]) -> None:
    from training.data.inspection.report import inspect_shop, print_inspection

    inspection = inspect_shop(options["data"], options["shop"], options["until"])
    print_inspection(inspection, as_json=options["json"])
    if inspection["verdict"]["refused"]:
        raise FailedPrecondition("training would refuse these files for the reasons stated")


def _require_directory(data: Path) -> None:
    """Refuse a missing directory before the imports of training, which take seconds."""
    if not data.exists():
        raise FailedPrecondition(f"{data} does not exist: --data is the directory with the shop's files")


def _evaluate(options: dict[str, Any]) -> None:
    _require_directory(options["data"])
    from cli.evaluate import evaluate

    options["as_json"] = options.pop("json")
    required = [options.pop(name) for name in ("data", "bundle", "split", "out")]
    evaluate(*required, shop_file=options.pop("shop"), **options)


def _import(options: dict[str, Any]) -> None:
    from cli.import_events import import_events
    from services.catalog.bundle import Bundle
    from training.data.dataset import read_shop
    from training.data.inspection.verdict import assess_shop

    bundle = Bundle(options["bundle"])
    shop = read_shop(options["data"], options["shop"], options["until"])
    assess_shop(shop).require(allow_losses=options["allow_losses"])
    settings = Settings(bundle=bundle.directory, state=options["state"])
    counts = import_events(settings, bundle, shop)
    print(f"{counts.recorded} events imported")  # noqa: T201
    if counts.duplicates:
        print(f"{counts.duplicates} events skipped: their ids exist already", file=sys.stderr)  # noqa: T201
    if counts.refused:
        lines = [f"{counts.refused} events refused, such as:", *counts.refusals]
        print("\n  ".join(lines), file=sys.stderr)  # noqa: T201
    if counts.refused and not counts.recorded + counts.duplicates:
        raise FailedPrecondition("no event could be imported: correct the file and import again")


def _import_shop(options: dict[str, Any]) -> None:
    from training.data.presets import PRESETS
    from training.data.presets.conversion import convert

    preset = options["preset"]
    if preset not in PRESETS:
        raise InvalidArgument.of("from", f"{preset!r} is none of {', '.join(PRESETS)}")
    for line in convert(PRESETS[preset], options["data"], options["out"]):
        print(line)  # noqa: T201 - a command's answer


def _sync(options: dict[str, Any]) -> None:
    from cli.catalog_sync import RemoteCatalog, synchronize
    from training.data.dataset import read_catalog
    from training.data.inspection.verdict import assess_items

    directory, file = options["data"], ""
    if options["items"]:
        directory, file = options["items"].parent, options["items"].name
    shop = read_catalog(directory, options["shop"], file)
    assess_items(shop).require(allow_losses=options["allow_losses"])
    match, images, columns = shop.reports["items"].match, shop.images, shop.settings.items
    assert match is not None  # noqa: S101 - the table was matched
    attributes = [*columns.text_attributes, *columns.number_attributes]
    attributes += [f"_{name}" for name in columns.filter_only]
    catalog = RemoteCatalog(options["server"])
    try:
        for line in synchronize(
            catalog,
            shop.items,
            list(match.fields),
            attributes,
            lambda item_id: images.read(item_id) if item_id in images else None,
            apply=options["apply"],
            max_deletions=options["max_deletions"],
            lost_rows=shop.reports["items"].rows_lost,
        ):
            print(line)  # noqa: T201 - a command's answer
    finally:
        catalog.close()


def _analyze(options: dict[str, Any]) -> None:
    from services.storage import signing_secret, store

    state, url, secret = (options.pop(name) for name in ("state", "ranking_database", "secret"))
    database, secret_file = state / "ranking.sqlite", state / signing_secret.FILE
    for path, option in ((database, url), (secret_file, secret)):
        if not option and not path.is_file():
            raise FailedPrecondition(f"{path} does not exist: is {state} the state of a ranking service?")
    engine = store.open_engine(url or f"sqlite:///{database.absolute()}")
    try:
        _report(engine, signing_secret.signing_secret(secret, state), options)
    finally:
        engine.dispose()


def _report(engine: Any, secret: bytes, options: dict[str, Any]) -> None:
    from analytics import command

    by, as_json = options.pop("by"), options.pop("json")
    experiment, off_policy, goal = (options.pop(name) for name in ("experiment", "off_policy", "goal"))
    since, until = options["since"], options["until"]
    if since and until and since >= until:
        raise InvalidArgument.of("since", "is not before until")
    types = {"goal": goal} if experiment or off_policy else {"impression_type": options["impression_type"]}
    command.check_event_types(engine, types)
    if experiment:
        report = command.experiment_report(
            engine, secret, experiment, goal, since, until, options["purchase_type"]
        )
    elif off_policy:
        report = command.policy_report(engine, secret, goal, since, until)
    else:
        report = command.traffic_report(engine, secret, by, **options)
    command.print_report(report, as_json=as_json)


def _serve(options: dict[str, Any]) -> None:
    from services.core import gc_tuning
    from services.rpc.server import wait_for_stop_signal
    from services.serving.app import App, first_bundle
    from services.serving.loaded_bundle import ALL

    gc_tuning.enable()
    service = options.pop("service")
    settings = settings_of({name: value for name, value in options.items() if value is not None})

    async def run() -> None:
        hosted = (service,) if service else ALL
        app = App(settings, hosted, await first_bundle(settings, hosted))
        await app.start()
        device = f" with encoders on {app.device}" if app.device else ""
        logging.getLogger("vitrine").info(
            "bundle %s is served on port %d%s", app.bundle.version, app.port, device
        )
        await wait_for_stop_signal()
        await app.stop()

    try:
        asyncio.run(run())
    finally:
        gc_tuning.unfreeze()


if __name__ == "__main__":
    sys.exit(main())
