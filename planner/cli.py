"""The command line: click wiring only. What a command does is imported when it runs.

`vramplan MODEL` is `vramplan plan MODEL`: a first word that is no command's name is a model.
"""

from __future__ import annotations

import gc
import os
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click

from vramplan import __version__
from vramplan.planner.errors import UsageError, nearest, shown, unknown
from vramplan.planner.training import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from vramplan.planner.training import Option

_LARGEST_PROFILE = 2**20  # bytes; a profile is a few lines
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """A group whose default command is `plan`, and whose help shows that command's options too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = ("-h", "--help", "--version")
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["plan", *args]
        return super().parse_args(ctx, args or ["--help"])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [param.get_help_record(ctx) for param in plan.params if isinstance(param, click.Option)]
        with formatter.section("Options of vramplan MODEL"):
            formatter.write_dl([record for record in records if record is not None])
        super().format_options(ctx, formatter)


@click.group(
    cls=_Commands, context_settings=_CONTEXT, options_metavar="", subcommand_metavar="MODEL [OPTIONS] | COMMAND ..."
)
@click.version_option(__version__, prog_name="vramplan", message="%(prog)s %(version)s")
def cli() -> None:
    """What a fine-tune needs before it runs.

    MODEL is a bundled name, a config.json, a model folder, or a Hugging Face Hub id.

    \b
    Examples:
      vramplan llama-3.1-8b --method qlora --rank 16
      vramplan qwen3-4b --method full --optimizer adamw_8bit --gpu rtx-4090
      vramplan ./my-model/config.json --method lora --json

    Exit codes: 0 done, and it fits where a GPU was named; 1 it does not fit the named GPU; 2 the question was wrong.
    """


def _training_options(command: Callable[..., int]) -> Callable[..., int]:
    """Adds every training option. Values stay as typed: training.parse_options judges them."""
    for option in reversed(OPTIONS.values()):
        command = _click_option(option)(command)
    return command


def _click_option(option: Option) -> Callable[[Callable[..., int]], Callable[..., int]]:
    help_text = f"{option.help}  [default: {option.default}]"
    if option.kind == "flag":
        no = option.flag.replace("--", "--no-", 1)
        return click.option(f"{option.flag}/{no}", option.name, default=None, help=help_text)
    few = 0 < len(option.choices) <= 6
    metavar = {"integer": "N", "number": "X", "names": "NAMES", "choice": "NAME"}[option.kind]
    return click.option(option.flag, option.name, metavar="|".join(option.choices) if few else metavar, help=help_text)


@cli.command()
@click.argument("model", required=False)
@_training_options
@click.option("--gpu", metavar="NAME|SIZE", help="A GPU of `vramplan gpus`, or a size such as 24GiB.")
@click.option(
    "--stack", metavar="VERSIONS", help="Versions to plan for, such as torch=2.11,peft=0.21.  [default: installed]"
)
@click.option("--config", metavar="FILE", help="A TOML file with the same names; the command line goes first.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--explain", is_flag=True, help="Show each memory row's formula and source.")
@click.option("--advice", is_flag=True, help="Show what would lower the peak, and by how much.")
@click.option("--timeline", is_flag=True, help="Draw the memory over the step.")
def plan(
    model: str | None, config: str | None, as_json: bool, explain: bool, advice: bool, timeline: bool, **options: object
) -> int:
    """Plan a fine-tuning run of MODEL.

    \b
    Examples:
      vramplan plan llama-3.1-8b --method qlora --rank 16
      vramplan plan gpt2 --method full --seq-len 512 --explain
      vramplan plan qwen3-4b --method lora --gpu rtx-4090 --advice --timeline
    """
    asked: dict[str, Any] = {"model": model, **options}
    asked = {name: value for name, value in asked.items() if value is not None}
    if config is not None:
        asked = _profile(config) | asked
    if "model" not in asked:
        raise UsageError("no model is named; add one, such as vramplan llama-3.1-8b (MODEL)")
    from vramplan.planner import report
    from vramplan.planner.plan import plan as make

    made = make(**asked)
    if as_json:
        answer = made.to_dict()
        if advice:
            answer["advice"] = [{"change": each.change, "saves_bytes": each.saves_bytes} for each in made.advice()]
        report.print_json(answer)
    else:
        report.print_plan(made, explain=explain, advice=advice, timeline=timeline)
    return 1 if made.fit is not None and not made.fit.fits else 0


@cli.command(short_help="List the bundled models.")
@click.argument("words", metavar="[FILTER]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def models(words: Sequence[str], as_json: bool) -> None:
    """List the bundled models, or those whose name or alias holds every word of FILTER.

    \b
    Examples:
      vramplan models
      vramplan models qwen 4b
    """
    from vramplan.planner import catalog, report

    found = [model for model in catalog.models() if _holds((model.name, *model.aliases), words)]
    if not found:
        raise unknown("model", " ".join(words), (model.name for model in catalog.models()), "FILTER")
    if as_json:
        report.print_json(report.fields(found))
    else:
        report.print_models(found)


@cli.command(short_help="List the known GPUs.")
@click.argument("words", metavar="[FILTER]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def gpus(words: Sequence[str], as_json: bool) -> None:
    """List the known GPUs by memory, or those whose name or architecture holds every word of FILTER.

    \b
    Examples:
      vramplan gpus
      vramplan gpus ada --json
    """
    from vramplan.planner import catalog, report

    names = {gpu: (gpu.name, gpu.title, gpu.architecture or "", *gpu.aliases) for gpu in catalog.gpus()}
    found = [gpu for gpu in names if _holds(names[gpu], words)]
    if not found:
        raise unknown("GPU", " ".join(words), (gpu.name for gpu in names), "FILTER")
    found.sort(key=lambda gpu: (gpu.budget_bytes, gpu.name))
    if as_json:
        report.print_json(report.fields(found))
    else:
        report.print_gpus(found)


def _holds(names: Iterable[str], words: Iterable[str]) -> bool:
    whole = "\n".join(names).lower()
    return all(word.lower() in whole for word in words)


def _profile(file: str) -> dict[str, Any]:
    """The options of a profile file, by their names; `model`, `gpu` and `stack` may stand there too."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = _read_profile(file)
    try:
        profile = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deeply"
        raise UsageError(f"{shown(file)} is no TOML: {reason} (--config)") from None
    known = [*OPTIONS, "model", "gpu", "stack"]
    for name in profile:
        if name not in known:
            raise unknown(f"option in {shown(file)}:", name, known, "--config")
    return profile


def _read_profile(file: str) -> str:
    from pathlib import Path

    path: Path = Path(file)
    try:
        if not path.is_file():  # a pipe or a device would block, or never end
            raise UsageError(f"{shown(file)} is no file; name a TOML file of options (--config)")
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST_PROFILE + 1)
        if len(raw) > _LARGEST_PROFILE:
            raise UsageError(f"{shown(file)} is larger than 1 MiB, which no profile is (--config)")
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{shown(file)} is not UTF-8 text (--config)") from None
    except OSError as error:
        raise UsageError(
            f"cannot read {shown(file)}: {(error.strerror or 'no reason given').lower()} (--config)"
        ) from None


def _reason(error: OSError) -> str:
    return (error.strerror or "no reason given").lower()


def _meant_command(args: Sequence[str]) -> str:
    """A hint where the word taken for a model is nearly a command's name."""
    word = args[0] if args else ""
    close = [] if word in cli.commands else nearest(word, cli.commands, 1)
    return f"; or was the command {close[0]} meant?" if close else ""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 does not fit the named GPU, 2 a wrong question, 130 interrupted.

    Nothing else may be taken for an answer: a full disk exits with 74, a bug in vramplan with 70.
    """
    gc.set_threshold(100_000)  # next to nothing here is in cycles, and looking for them takes a tenth of a plan's time
    from vramplan.planner import report

    words = sys.argv[1:] if args is None else list(args)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder's name may be beyond the terminal's character set
    try:
        code = cli.main(words, prog_name="vramplan", standalone_mode=False) or 0
        sys.stdout.flush()
    except UsageError as error:
        report.print_error(f"{error}{_meant_command(words) if str(error).startswith('unknown model') else ''}")
        code = 2
    except click.ClickException as error:
        report.print_error(error.format_message())
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader has seen enough (`| head`), and nothing is wrong
        code = 0
        _close_stdout()
    except OSError as error:
        report.print_error(f"cannot write the answer: {_reason(error)}")
        code = 74
        _close_stdout()
    except Exception:
        import traceback

        traceback.print_exc()
        report.print_error("this is a bug in vramplan, not in your question; please report it with the lines above")
        code = 70
    sys.exit(code)


def _close_stdout() -> None:
    """What could not be written must not be tried again, and complained about, when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
