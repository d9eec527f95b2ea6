"""The command `asyncllm-server`: arguments, configuration, logging, and the exit code.

What goes wrong before or during start-up is one clear line on standard error and a non-zero exit, never a traceback.
"""

import argparse
import asyncio
import logging
import sys
import time

import msgspec
import uvloop

from asyncllm import __version__
from asyncllm.config import Config, LoggingConfig, default_toml, load
from asyncllm.errors import AsyncLLMError

EXIT_USAGE = 2  # the configuration is wrong


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="asyncllm-server",
        description="Serve a language model over OpenAI-compatible HTTP from one process.",
        epilog="Every key of the file can be set by a variable such as ASYNCLLM_SERVER__PORT=9000.",
    )
    parser.add_argument("config", nargs="?", help="TOML file; without one, defaults and the environment count")
    parser.add_argument("--check", action="store_true", help="check the configuration, print what counts, and exit")
    parser.add_argument("--print-default", action="store_true", help="print a file with every key at its default")
    parser.add_argument("--version", action="version", version=f"asyncllm {__version__}")
    parser.add_argument("--probe", metavar="MODEL", help="say what a model is, what it needs and whether it is served")
    parser.add_argument("--json", action="store_true", help="with --probe: one JSON object")
    options = parser.parse_args(arguments)
    if options.json and not options.probe:
        parser.error("--json goes with --probe")
    if options.print_default:
        print(default_toml(), end="")
        return 0
    try:
        config = load(options.config)
        if options.check:
            print(msgspec.json.format(msgspec.json.encode(config), indent=2).decode())
            return 0
        set_up_logging(config.logging)
        if options.probe:
            return probe(options.probe, config, as_json=options.json)
        return run(config)
    except AsyncLLMError as error:
        print(f"asyncllm-server: {error.message}", file=sys.stderr)
        return EXIT_USAGE if error.code == "config" else 1


def run(config: Config) -> int:
    """Serve until told to stop."""
    from asyncllm.server.lifecycle import serve  # after --check and friends: this imports the server

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config))


def probe(name: str, config: Config, *, as_json: bool) -> int:
    """Print what a model is; 0 where it is served and fits a device of this machine, else 1."""
    from asyncllm import probe

    answer = probe.probe(name, config)
    print(msgspec.json.encode(answer).decode() if as_json else probe.report(answer))
    return 0 if answer.fits else 1


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """time, level, logger, message, and the traceback where there is one."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up_logging(config: LoggingConfig) -> None:
    """Standard error, text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if config.json else text)
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
