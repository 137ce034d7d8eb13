"""The command `vitrine`."""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

from services.errors import VitrineError
from services.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when it did what was asked, 1 with a line on stderr when it could not."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        run(options)
    except VitrineError as error:
        print(f"vitrine: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    return 0


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
    return parser


def _serve(options: dict[str, Any]) -> None:
    from services import wiring
    from services.server import until_told_to_stop

    service = options.pop("service")
    settings = Settings(**{name: value for name, value in options.items() if value is not None})

    async def run() -> None:
        app = wiring.App(settings, (service,) if service else wiring.ALL)
        await app.start()
        logging.getLogger("vitrine").info("bundle %s is served on port %d", app.bundle.version, app.port)
        await until_told_to_stop()
        await app.stop()

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
