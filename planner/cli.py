"""The command line: click wiring only. What a command does is imported when it runs.

`vramplan MODEL` is `vramplan plan MODEL`: a first word that is no command's name is a model.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from functools import partial
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from vramplan import __version__
from vramplan.planner.errors import Failure, UnknownArchitecture, UsageError, nearest, reason, shown, unknown
from vramplan.planner.training import OPTIONS, PHASE_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import date

    from vramplan.planner.plan import Plan
    from vramplan.planner.training import Option

_LARGEST_PROFILE = 2**20  # bytes; a profile is a few lines
_PLANNED = (*OPTIONS, "model", "gpu", "stack", "calibration", "prices")  # what a plan takes, in a profile as in Python
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """A group whose default command is `plan`, and whose help shows that command's options too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = ("-h", "--help", "--version")
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["plan", *args]
        return super().parse_args(ctx, args or ["--help"])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and what `plan` takes as its first word."""
        found = super().shell_complete(ctx, incomplete) + click.Command.shell_complete(plan, ctx, incomplete)
        if not incomplete.startswith("-"):
            models = plan.params[0].shell_complete(ctx, incomplete)
            found += [item for item in models if item.type == "plain" or not found]
        return list({item.value: item for item in found}.values())  # --help is in both

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [param.get_help_record(ctx) for param in plan.params if isinstance(param, click.Option)]
        with formatter.section("Options of vramplan MODEL"):
            formatter.write_dl([record for record in records if record is not None])
        super().format_options(ctx, formatter)


# What a shell offers for the word that is being typed (click's completion).


def _starting(names: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    return lambda _, __, typed: [name for name in names if name.startswith(typed)]


def _models(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Bundled models, or files where none begins so."""
    from vramplan.planner import catalog

    found = [CompletionItem(model.name) for model in catalog.models() if model.name.startswith(typed)]
    return found or _files(ctx, param, typed)


def _gpus(_: click.Context, __: click.Parameter, typed: str) -> list[str]:
    from vramplan.planner import catalog

    return [gpu.name for gpu in catalog.gpus() if gpu.name.startswith(typed)]


def _files(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(typed, type="file")]


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


def _training_options(command: Callable[..., int], **defaults: str) -> Callable[..., int]:
    """Adds every training option, with `defaults` of the command's own in its help.

    Values stay as typed: training.parse_options judges them.
    """
    for option in reversed(OPTIONS.values()):
        command = _click_option(option._replace(default=defaults.get(option.name, option.default)))(command)
    return command


def _step_options(command: Callable[..., int]) -> Callable[..., int]:
    """The same for what runs training steps alone."""
    for option in reversed(OPTIONS.values()):
        command = command if option.name in PHASE_OPTIONS else _click_option(option)(command)
    return command


def _click_option(option: Option) -> Callable[[Callable[..., int]], Callable[..., int]]:
    help_text = f"{option.help}  [default: {option.default}]"
    if option.kind == "flag":
        no = option.flag.replace("--", "--no-", 1)
        return click.option(f"{option.flag}/{no}", option.name, default=None, help=help_text)
    few = 0 < len(option.choices) <= 6
    metavar = {"integer": "N", "number": "X", "names": "NAMES", "choice": "NAME"}[option.kind]
    shown_as = "|".join(option.choices) if few else metavar
    return click.option(
        option.flag, option.name, metavar=shown_as, help=help_text, shell_complete=_starting(option.choices)
    )


def _views(command: Callable[..., int]) -> Callable[..., int]:
    """Adds how a plan is shown."""
    flags = {
        "--timeline": "Draw the memory over the step.",
        "--advice": "Show what would lower the peak, and by how much.",
        "--explain": "Show each memory row's formula and source.",
    }
    for flag, text in flags.items():
        command = click.option(flag, is_flag=True, help=text)(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")(command)


_gpu = click.option(
    "--gpu", metavar="NAME|SIZE", shell_complete=_gpus, help="A GPU of `vramplan gpus`, or a size such as 24GiB."
)
_stack = click.option(
    "--stack", metavar="VERSIONS", help="Versions to plan for, such as torch=2.11,peft=0.21.  [default: installed]"
)
_calibration = click.option(
    "--calibration/--no-calibration",
    default=None,
    help="Use what `vramplan probe` learned about the GPU here.  [default: True]",
)
_prices = click.option(
    "--prices",
    metavar="FILE",
    shell_complete=_files,
    help="A CSV file of prices, instead of those of `vramplan prices`.",
)
_config = click.option(
    "--config",
    metavar="FILE",
    shell_complete=_files,
    help="A TOML file with the same names; the command line goes first.",
)


def _plot(what: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    return click.option(
        "--plot", metavar="FILE", shell_complete=_files, help=f"Draw {what} into an .svg, .png or .pdf file."
    )


@cli.command()
@click.argument("model", shell_complete=_models, required=False)
@_training_options
@_gpu
@_stack
@_calibration
@_prices
@_config
@_views
@_plot("the memory over the step")
@click.option("--plot-of", metavar="timeline|breakdown", help="What --plot draws.  [default: timeline]")
def plan(
    model: str | None,
    config: str | None,
    as_json: bool,
    explain: bool,
    advice: bool,
    timeline: bool,
    plot: str | None,
    plot_of: str | None,
    **options: object,
) -> int:
    """Plan a fine-tuning run of MODEL.

    \b
    Examples:
      vramplan plan llama-3.1-8b --method qlora --rank 16
      vramplan plan gpt2 --method full --seq-len 512 --explain
      vramplan plan qwen3-4b --method lora --gpu rtx-4090 --advice --timeline
      vramplan plan qwen3-4b --gpu rtx-4090 --plot cards.png --plot-of breakdown
    """
    asked = _question(config, model=model, **options)
    from vramplan.planner import report
    from vramplan.planner.plan import plan as make

    if plot_of not in (None, "timeline", "breakdown"):
        raise unknown("picture", plot_of, ("timeline", "breakdown"), "--plot-of")
    if plot_of and not plot:
        raise UsageError("--plot-of says what --plot draws; add --plot FILE")
    _ready(plot)
    try:
        made = make(**asked)
    except UnknownArchitecture as error:
        if plot:  # a trace has no timeline
            raise
        return _kept(asked, error, as_json)
    if as_json:
        report.print_json(_as_dict(made, advice))
    else:
        report.print_plan(made, explain=explain, advice=advice, timeline=timeline)
    _draw(plot, plot_of or "timeline", made, asked)
    return 1 if made.fit is not None and not made.fit.fits else 0


def _ready(plot: str | None) -> None:
    """Says before the work is done what would keep its picture from being drawn."""
    if plot:
        from vramplan.planner import report_plots

        report_plots.ready(plot)


def _draw(plot: str | None, what: str, made: Any, asked: Mapping[str, Any], name: str = "") -> None:
    if plot:
        from vramplan.planner import report_plots

        report_plots.draw(plot, what, made, _again(asked, name))


def _again(asked: Mapping[str, Any], name: str = "") -> str:
    """The command that asks the same, all options of a profile file written out."""
    from vramplan.planner.trial import command

    where = asked.get("gpu"), asked.get("stack"), asked.get("calibration", True), asked.get("prices")
    return command(asked["model"], asked, *where, name=name)


def _as_dict(made: Plan, advice: bool) -> dict[str, Any]:
    changes = [{"change": each.change, "saves_bytes": each.saves_bytes} for each in made.advice()] if advice else []
    return made.to_dict() | ({"advice": changes} if advice else {})


def _kept(asked: dict[str, Any], error: UnknownArchitecture, as_json: bool) -> int:
    """Answers from an earlier trace of the same question, where there is one."""
    from vramplan.planner import traces

    found = traces.answered(**asked)
    if found is None:
        raise UsageError(f"{error}; `vramplan trace {asked['model']}` with the same options runs its own code")
    return _print_trace(found, as_json)


@cli.command(short_help="Write a plan as a page for a browser.")
@click.argument("model", shell_complete=_models, required=False)
@click.option(
    "-o", "--output", metavar="FILE", shell_complete=_files, help="The page, an .html file; an earlier one is replaced."
)
@_training_options
@_gpu
@_stack
@_calibration
@_prices
@_config
def report(model: str | None, config: str | None, output: str | None, **options: object) -> int:
    """Write the plan of MODEL as one page that opens without a network.

    It has what `vramplan MODEL` prints, with the memory over the step and on each card, what fits --gpu (or the
    smallest card that holds the plan), how each figure is worked out, and how to make it again. Needs
    pip install 'vramplan[report]'.

    \b
    Examples:
      vramplan report llama-3.1-8b --gpu rtx-4090 -o report.html
      vramplan report ./my-model/config.json --method full -o full.html
    """
    asked = _question(config, model=model, **options)
    if output is None:
        raise UsageError("no file is named for the page; add one, such as -o report.html (--output)")
    from vramplan.planner import report_page
    from vramplan.planner.report import tracked

    report_page.ready(output)

    def each(searches: Sequence[Callable[[], Any]]) -> Iterable[Any]:
        return (search() for search in tracked(searches, len(searches), "searching"))

    again = f"{_again(asked, 'report')} -o {shlex.quote(output)}"
    made = report_page.write(output, asked, again, each)
    return 1 if made.fit is not None and not made.fit.fits else 0


@cli.command(short_help="Find the largest run that fits a GPU.")
@click.argument("model", shell_complete=_models, required=False)
@click.option(
    "--over",
    metavar="NAMES",
    help="What is varied: batch_size, seq_len, rank, method, num_gpus.  [default: batch_size,seq_len]",
)
@_gpu
@_training_options
@_stack
@_calibration
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@_plot("the largest batch for each sequence length")
def fit(
    model: str | None, over: str | None, config: str | None, as_json: bool, plot: str | None, **options: object
) -> int:
    """Find the largest run of MODEL that fits a GPU.

    Each size named by --over is varied by itself, the other options as asked: the largest that fits with its whole
    cache, how much it leaves, and why the next one fails. batch_size and seq_len together give the largest batch for
    each sequence length besides, with method for each method. Of num_gpus it is the fewest that hold the run, as many
    on each host, under fsdp unless --parallel says otherwise.

    \b
    Examples:
      vramplan fit llama-3.1-8b --gpu rtx-4090 --plot frontier.svg
      vramplan fit qwen3-4b --gpu 16GiB --over rank,method --seq-len 4096
      vramplan fit llama-3.2-1b --gpu t4 --over batch_size --method full --json
      vramplan fit qwen3-4b --gpu 16GiB --over num_gpus --method full

    Exit codes: 0 something fits; 1 nothing does; 2 the question was wrong.
    """
    asked = _question(config, model=model, **options)
    from vramplan.planner import capacity, report, report_decide
    from vramplan.planner.parallel import in_order

    _ready(plot)

    def each(searches: Sequence[Callable[[], Any]]) -> Iterable[Any]:
        return report.tracked(in_order(searches), len(searches), "searching")

    asked.pop("prices", None)  # of a profile that is for plans as well
    varied = {} if over is None else {"over": over}
    found = capacity.fit(**{"gpu": None} | asked | varied, each=each)
    if as_json:
        report.print_json(found.to_dict())
    else:
        report_decide.print_fit(found)
    _draw(plot, "frontier", found, asked, "fit" if over is None else f"fit --over {shlex.quote(over)}")
    return 0 if found.fits else 1


@cli.command(short_help="Find the cheapest and the fastest way to train.")
@click.argument("model", shell_complete=_models, required=False)
@click.option("--budget", metavar="DOLLARS", help="The most that the run may cost, such as 50usd.")
@click.option("--deadline", metavar="TIME", help="The longest that it may take, such as 8h, 90min or 2d.")
@click.option("--gpu", metavar="NAMES", help="One GPU of `vramplan gpus`, or several separated by commas.")
@click.option("--offers", metavar="WORDS", help="Only offers that these words find, as in `vramplan prices`.")
@_prices
@partial(_training_options, method="all of them")
@_stack
@_calibration
@_config
@click.option("--all", "everything", is_flag=True, help="Show every way, not only those that no other beats.")
@click.option("--json", "as_json", is_flag=True, help="Print every way as JSON.")
def choose(
    model: str | None, config: str | None, offers: str | None, everything: bool, as_json: bool, **options: object
) -> int:
    """Find the cheapest and the fastest way to train MODEL: the method, the GPU, and who lets it.

    Every method, or the one named, is planned on every GPU that has an offer, and priced where it fits; the other
    options are the same on every GPU. What is within a budget and a deadline goes by the middle of the hours' range.

    \b
    Examples:
      vramplan choose llama-3.1-8b --budget 50usd --deadline 8h
      vramplan choose qwen3-4b --method lora --gpu rtx-4090,l4 --examples 20000
      vramplan choose gpt2 --seq-len 512 --deadline 90min --offers "on demand"

    Exit codes: 0 there is a way; 1 there is none within budget and deadline; 2 the question was wrong.
    """
    asked = _question(config, model=model, **options)
    from vramplan.planner import choose as choosing
    from vramplan.planner import report, report_decide

    def each(trials: Sequence[Callable[[], Any]]) -> Iterable[Any]:
        return (trial() for trial in report.tracked(trials, len(trials), "planning"))

    found = choosing.choose(asked.pop("model"), offers=(offers or "").split(), each=each, **asked)
    if as_json:
        report.print_json(found.to_dict())
    else:
        report_decide.print_choice(found, everything=everything)
    return 0 if found.within else 1


@cli.command(short_help="Show plans side by side.")
@click.argument("plans", metavar="PLAN...", shell_complete=_models, nargs=-1)
@_training_options
@_gpu
@_stack
@_calibration
@_prices
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def compare(plans: Sequence[str], config: str | None, as_json: bool, **options: object) -> int:
    """Show two plans or more side by side, and where they differ from the first.

    A PLAN is a model, a TOML file of options, an answer saved with --json (a plan's or a trace's), or a command line
    of its own in quotes. Options beside them are for all plans but the saved ones; a plan's own go first.

    \b
    Examples:
      vramplan compare llama-3.1-8b qwen3-8b --method lora --gpu rtx-4090
      vramplan compare "gpt2 --method full" "gpt2 --rank 8" --seq-len 512
    """
    shared = _asked(config, **options)
    if "model" in shared:
        raise UsageError(f"{shown(config)} names a model; leave it out, since each PLAN names its own")
    from vramplan.planner import comparison, report, report_decide

    if not 2 <= len(plans) <= len(comparison.LETTERS):
        raise UsageError(f"compare takes 2 to {len(comparison.LETTERS)} plans, and here are {len(plans)} (PLAN)")
    sides = [comparison.side(_answer(word, shared), word) for word in plans]
    if as_json:
        report.print_json(comparison.to_dict(sides))
    else:
        report_decide.print_comparison(sides)
    return 0


def _answer(word: str, shared: dict[str, Any]) -> dict[str, Any]:
    """The answer that a PLAN of `compare` names: one that was saved, or a plan made now."""
    from vramplan.planner import comparison
    from vramplan.planner.plan import plan as make

    if word.endswith(".json") and (found := comparison.saved(word)) is not None:
        return found
    own: dict[str, Any] = {"model": word}
    if word.endswith(".toml"):
        own = _question(word)
    elif " " in word and not os.path.lexists(word):
        try:
            words = shlex.split(word)
        except ValueError:  # a quote that does not end
            raise UsageError(f"{shown(word)} is no command line; close its quotes (PLAN)") from None
        words = words[words[:1] == ["vramplan"] :]
        params = plan.make_context("plan", words[words[:1] == ["plan"] :]).params
        own = _question(params["config"], **{name: params[name] for name in params if name in _PLANNED})
    return make(**shared | own).to_dict()


class _Lists(click.Command):
    """A command whose options may be given several times, those whose values hold commas also by several words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeated(args)))


_WORD_LISTS = ("--stack", *(option.flag for option in OPTIONS.values() if option.kind == "names"))


def _repeated(args: Iterable[str]) -> Iterable[str]:
    """The words after such an option, up to the next option, each with the option before it."""
    option, first = "", False
    for word in args:
        if word.startswith("-"):
            option, first = word if word in _WORD_LISTS else "", True
        else:
            if option and not first:
                yield option
            first = False
        yield word


def _list_options(command: Callable[..., int]) -> Callable[..., int]:
    """Every training option, to be given as often as there are values."""
    for option in reversed(OPTIONS.values()):
        flag = f"{option.flag}/{option.flag.replace('--', '--no-', 1)}" if option.kind == "flag" else option.flag
        metavar = "NAMES..." if option.kind == "names" else None if option.kind == "flag" else "LIST"
        command = click.option(flag, option.name, multiple=True, default=None, metavar=metavar, help=option.help)(
            command
        )
    return command


@cli.command(cls=_Lists, short_help="Make a table: every option may be a list.")
@click.argument("models", metavar="MODEL...", shell_complete=_models, nargs=-1)
@click.option("--columns", metavar="NAMES", help="What is shown.  [default: memory,gpu,cost; others with --gpu]")
@click.option("--pivot", metavar="OPTION", help="The option whose values stand side by side; model and gpu too.")
@click.option("--format", "form", metavar="NAME", help="terminal, markdown, csv, json, html or latex.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--into",
    metavar="FILE",
    shell_complete=_files,
    help="Write the table into a document, in the place of an earlier one.",
)
@click.option("--between", metavar="MARKER", help="That place: between <!-- MARKER --> and <!-- /MARKER -->.")
@click.option(
    "--check",
    metavar="FILE",
    shell_complete=_files,
    help="Make a Markdown document's tables anew; exit with 1 if cells differ.",
)
@_list_options
@click.option("--gpu", multiple=True, metavar="LIST", help="GPUs of `vramplan gpus`, or sizes such as 24GiB.")
@click.option(
    "--stack", multiple=True, metavar="VERSIONS...", help="Versions to plan for, such as torch=2.11,peft=0.21."
)
@_calibration
@_prices
@_config
@_plot("what is on a GPU in each row")
def table(
    models: Sequence[str],
    config: str | None,
    plot: str | None,
    form: str | None,
    as_json: bool,
    into: str | None,
    between: str | None,
    check: str | None,
    **options: Any,
) -> int:
    """Make a table of plans: every option may be a list, and every combination is planned.

    Values are separated by commas. What holds commas itself (--target-modules, --stack) takes several words, so MODEL
    goes before it. The caption holds the command that makes the table again, with the versions that were planned for.

    \b
    Columns: total, trainable, trainable_percent, adapter, memory, allocated,
    reserved, context, weights, gradients, optimizer_states, activations, logits,
    peak_phase, gpu, hours, cost, kwh, offer, download, checkpoint, disk; with
    --gpu also fits, headroom, step_time, tokens_per_s.

    \b
    Examples:
      vramplan table llama-3.2-3b llama-3.1-8b --method full,lora,qlora --columns memory,gpu,cost
      vramplan table llama-3.2-1b --rank 8,16,32 --target-modules "q_proj,v_proj" attention --columns trainable
      vramplan table gpt2 --method lora,qlora --seq-len 512,1024 --pivot method --format markdown
      vramplan table llama-3.1-8b --method full --parallel fsdp --num-gpus 1,2,4,8 --gpu h100 --plot gpus.svg

    Exit codes: 0 done; 1 a checked table is stale; 2 the question was wrong; 130 interrupted, what is done is shown.
    """
    from vramplan.planner import report_table

    if check is not None:
        others = {"MODEL": models, "into": into, "between": between, "format": form, "config": config, "plot": plot}
        others |= options
        if given := [name for name, value in others.items() if value not in (None, ())]:
            raise UsageError(f"--check makes each table by its own caption; leave {given[0]} out (--check)")
        return _check_tables(check)
    form = "json" if as_json else form
    if form is not None:
        report_table.check_format(form)
    _ready(plot)
    question = _table_question(models, config, options)
    if into is not None:
        if plot:
            raise UsageError("--plot draws what is shown, and --into writes a document; ask one at a time")
        return _table_into(into, between, form, question)
    if between is not None:
        raise UsageError("--between says where in a document the table goes; name the document (--into)")
    from vramplan.planner.table import table as make

    made = make(**question, each=report_table.planning, drawn=plot is not None)
    report_table.print_table(made, form or "terminal")
    if made.missing:
        return 130
    if plot:
        from vramplan.planner import report_plots

        report_plots.draw(plot, "rows", made, made.command)
    return 0


def _table_question(models: Sequence[str], config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What a table is asked for: each option with all its values, the command line before the profile."""
    said: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, ())}
    for name in said.keys() & {*OPTIONS, "gpu"}:
        option = OPTIONS.get(name)
        if option is None or option.kind not in ("flag", "names"):
            said[name] = [value.strip() for values in said[name] for value in values.split(",")]
    profile = {} if config is None else _profile(config)
    for name, value in profile.items():
        if name in OPTIONS and OPTIONS[name].kind == "names" and isinstance(value, list):
            profile[name] = value if any(isinstance(each, list) for each in value) else [value]
    named = profile.pop("model", [])
    question = profile | said
    question["models"] = list(models) or (named if isinstance(named, list) else [named])
    return question


def _table_into(file: str, between: str | None, form: str | None, question: dict[str, Any]) -> int:
    """Writes a table into a document, which is left as it is where nothing but the day would change."""
    from dataclasses import replace
    from pathlib import Path

    from vramplan.planner import pasted, report, report_table
    from vramplan.planner.files import save
    from vramplan.planner.table import table as make

    if between is None:
        raise UsageError("--into needs the marker that the table stands between; add one, such as --between memory")
    kind = pasted.format_of(file, form)
    document = pasted.read(file, "--into")
    pasted.between(document, between, kind)  # before anything is planned
    made = make(**question, each=report_table.planning)
    if made.missing:
        return 130

    def render(day: date) -> str:
        return report_table.render(replace(made, date=day), kind)

    renewed = pasted.renewed(document, between, kind, made.date, render)
    if renewed != document:
        save(Path(file), renewed, "--into")
    report.print_lines([f"{file}: the table is {'as it should be' if renewed == document else 'written'}"])
    return 0


def _check_tables(file: str) -> int:
    """Makes the tables of a document anew, and names the cells that changed."""
    from vramplan.planner import pasted, report_table
    from vramplan.planner.table import table as make

    answers = []
    for found in pasted.tables(pasted.read(file, "--check"), file):
        where = f"{file}, line {found.line}"
        try:
            params = table.make_context("table", list(found.words), help_option_names=[]).params
            asked = {name: value for name, value in params.items() if name in (*_PLANNED, "columns", "pivot")}
            made = make(**_table_question(params["models"], None, asked), each=report_table.planning)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        except click.ClickException as error:
            raise UsageError(f"{where}: {error.format_message()} (--check)") from None
        if made.missing:
            return 130
        sheet = report_table.layout(made)
        answers.append((where, pasted.changes(found.rows, [sheet.header, *sheet.rows], sheet.labels)))
    report_table.print_changes(answers)
    return 1 if any(changes for _, changes in answers) else 0


@cli.command(short_help="Plan the run of another framework's config.")
@click.argument("files", metavar="FILE...", shell_complete=_files, nargs=-1)
@click.option(
    "--from",
    "framework",
    metavar="NAME",
    help="axolotl, llamafactory, trl, transformers, accelerate or deepspeed.",
)
@click.option("--ignore", metavar="KEY", multiple=True, help="Plan as if this key were not there.")
@click.option(
    "--model", metavar="MODEL", shell_complete=_models, help="The model, where FILE names none or another is meant."
)
@_training_options
@_gpu
@_stack
@_calibration
@_prices
@_views
def check(
    files: Sequence[str],
    framework: str | None,
    ignore: Sequence[str],
    as_json: bool,
    explain: bool,
    advice: bool,
    timeline: bool,
    **options: object,
) -> int:
    """Plan the run that a config of another framework describes.

    FILE is a YAML file of axolotl, LLaMA-Factory or trl sft, a training script, TrainingArguments and an adapter's
    adapter_config.json as JSON, or the folder that holds both; or what launches a run on several GPUs, accelerate's
    YAML or DeepSpeed's JSON, by itself or beside one of those. What was read from which key comes first; keys that
    change memory and cannot be planned are named. Options on the command line go before the files. Nothing is run.

    \b
    Examples:
      vramplan check qlora.yml --gpu rtx-4090
      vramplan check trained --seq-len 1024 --explain
      vramplan check train.py --json
      vramplan check fsdp.yaml --model llama-3.1-8b --gpu h100
      vramplan check train.py fsdp.yaml --optimizer adamw_torch_fused

    Exit codes: 0 planned, and it fits where a GPU was named; 1 it does not fit the named GPU; 2 the question was wrong.
    """
    from vramplan.planner import configs, report, report_check
    from vramplan.planner.plan import plan as make

    machine = _asked(None, **{name: options.pop(name) for name in ("gpu", "stack", "calibration", "prices")})
    reading = configs.read(files, framework=framework, ignore=ignore, **_asked(None, **options))
    asked = {"model": reading.model, **machine, **reading.options}
    try:
        made = make(**asked)
    except UnknownArchitecture as error:
        return _kept(asked, error, as_json)
    if as_json:
        report.print_json(_as_dict(made, advice) | {"read": reading.to_dict()})
    else:
        report_check.print_check(reading, made, explain=explain, advice=advice, timeline=timeline)
    return 1 if made.fit is not None and not made.fit.fits else 0


@cli.command(short_help="Write a plan as another framework's config, or as a script.")
@click.argument("model", shell_complete=_models)
@click.option("--to", "target", metavar="NAME", help="trl, axolotl, llamafactory, accelerate or script; always named.")
@click.option("--dataset", metavar="NAME", help="The data set to name in it; a placeholder stands there without.")
@click.option("-o", "--output", metavar="FILE", shell_complete=_files, help="Write here.  [default: print it]")
@click.option("--force", is_flag=True, help="Overwrite FILE where it exists.")
@_training_options
@_gpu
@_stack
@_config
def export(
    model: str,
    target: str | None,
    dataset: str | None,
    output: str | None,
    force: bool,
    config: str | None,
    **options: object,
) -> int:
    """Write the plan of MODEL as a config that another framework runs, or as a training script.

    `vramplan check` of the file gives the same plan again. What a framework cannot run is refused by name; where you
    left an option open, the plan takes what the framework does, and a comment says so.

    \b
    Examples:
      vramplan export llama-3.1-8b --to axolotl --rank 32 -o axolotl.yml
      vramplan export qwen3-4b --to script --trainer trl --dataset trl-lib/Capybara -o finetune.py
      vramplan export gpt2 --to accelerate --method full --seq-len 1024
    """
    from vramplan.planner import export as exporting
    from vramplan.planner import report
    from vramplan.planner.plan import plan as make

    target = exporting.read_target(target)
    made = make(**_asked(config, model=model, **options))
    command = f"vramplan {shlex.join(click.get_current_context().obj)}"
    found = exporting.export(made, target, command=command, dataset=dataset)
    if output is None:
        report.print_text(found.text)
        return 0
    exporting.save(found, output, force=force)
    report.print_text(f"{output}: {report.recipe(made.model.name, found.options)}\n")
    return 0


@cli.command(short_help="Run the real code without a GPU, beside the plan.")
@click.argument("model", shell_complete=_models)
@_step_options
@_gpu
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the trace as JSON, the plan beside it.")
def trace(model: str, config: str | None, as_json: bool, **options: object) -> int:
    """Run a training step of MODEL's real code on tensors without memory, and show it beside the plan.

    transformers, PEFT, bitsandbytes and the optimizer run as they are installed; no GPU and no weights are needed. It
    works for every architecture that transformers can build, also where no plan can be made: there the trace is the
    answer, and `vramplan MODEL` with the same options gives it again. Needs pip install 'vramplan[probe]'.

    \b
    Examples:
      vramplan trace llama-3.2-1b --method qlora
      vramplan trace ./my-model/config.json --method full --gpu rtx-4090 --json
    """
    from vramplan.probes import trace as tracing

    return _print_trace(tracing.answer(**_asked(config, model=model, **options)), as_json)


def _print_trace(found: dict[str, Any], as_json: bool) -> int:
    from vramplan.planner import report, report_trace

    if as_json:
        report.print_json(found)
    else:
        report_trace.print_trace(found)
    return 1 if found["gpu"] and not found["gpu"]["fits"] else 0


@cli.command(short_help="Hold plans against measured runs.")
@click.argument("files", metavar="[FILE]...", shell_complete=_files, nargs=-1)
@click.option("--tolerance", metavar="PERCENT", help="Exit with 1 beyond it: 2, or allocated=1.5,reserved=5.")
@click.option("--json", "as_json", is_flag=True, help="Print every run's errors as JSON.")
@_plot("planned against measured")
def verify(files: Sequence[str], tolerance: str | None, as_json: bool, plot: str | None) -> int:
    """Hold plans against measured runs: those of each FILE, or those that come with vramplan.

    A FILE is JSON Lines, as vramplan probe writes them. Each run is planned for the GPU and the versions it ran with.
    A tolerance is the largest error of peak allocated memory in percent, or one for each figure named: allocated,
    reserved, device, loaded, ready. A plan that cannot be made, another count of trainable parameters, and a wrong
    word on whether it fits are beyond every tolerance.

    \b
    Examples:
      vramplan verify
      vramplan verify my-runs.jsonl --tolerance 2
      vramplan verify --tolerance allocated=1.5,reserved=10 --json
      vramplan verify --plot accuracy.svg

    Exit codes: 0 all within the tolerance, or none was named; 1 some are not; 2 the question was wrong.
    """
    from vramplan.planner import report
    from vramplan.planner import verify as verification

    _ready(plot)
    most = None if tolerance is None else verification.parse_tolerance(tolerance)
    runs = verification.read(files or verification.bundled())
    scores = list(report.tracked(map(verification.score, runs), len(runs), "planning"))
    if as_json:
        report.print_json(verification.to_dict(scores, most))
    else:
        report.print_scores(scores, most)
    if plot:
        from vramplan.planner import report_plots

        report_plots.draw(plot, "accuracy", scores, shlex.join(["vramplan", "verify", *files]))
    return 1 if most is not None and any(each.beyond(most) for each in scores) else 0


@cli.command(short_help="Measure real training steps on this GPU.")
@click.argument("model", shell_complete=_models, required=False)
@_step_options
@click.option(
    "--config", metavar="FILE", shell_complete=_files, help="A TOML file of options; the command line goes first."
)
@click.option("--quick", is_flag=True, help="Calibrate in 30 seconds, cold imports aside, not in 2 minutes.")
@click.option("--full", is_flag=True, help="Run a whole grid, up to an hour; on several GPUs their own.")
@click.option("--memory-limit", metavar="SIZE", help="Behave as a smaller GPU, of 16GiB for example.")
@click.option("--boundary", is_flag=True, help="Run the largest MODEL that is planned to fit, and the next.")
@click.option("--over", metavar="batch_size|seq_len", help="What --boundary varies.  [default: batch_size]")
@click.option(
    "--alone",
    is_flag=True,
    help="This GPU stands for all of --num-gpus: memory is measured, and nothing goes between them.",
)
@click.option("--snapshot", is_flag=True, help="Compare MODEL's plan with PyTorch's memory history of a step.")
@click.option(
    "--output",
    metavar="FILE",
    shell_complete=_files,
    help="Append results here, as JSON Lines.  [default: user data folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print every run, predicted and measured, as JSON.")
def probe(
    model: str | None,
    config: str | None,
    memory_limit: str | None,
    over: str | None,
    output: str | None,
    quick: bool,
    full: bool,
    boundary: bool,
    alone: bool,
    snapshot: bool,
    as_json: bool,
    **options: object,
) -> int:
    """Measure real training steps on this machine's GPU, beside their plans.

    Without MODEL it calibrates: short runs that fit the GPU, and what no formula gives, kept for later plans. With
    MODEL and its options it measures exactly that plan. Weights are random and tokens synthetic; nothing is downloaded
    but MODEL's config.json. It needs the extra probe: torch, transformers, accelerate, peft, bitsandbytes and
    nvidia-ml-py.

    With --num-gpus, torchrun starts a process for each GPU, and every one is measured. Without MODEL it runs bundled
    plans, all shared as --parallel says; with --full a grid in which each run has its own --parallel. ZeRO needs
    deepspeed besides. With --alone one GPU plays the first of any number: the real code of DDP, FSDP2 or DeepSpeed
    runs, and its collectives move nothing.

    A memory limit counts what PyTorch reserves; the CUDA context, which PyTorch cannot limit, is taken off first.

    \b
    Examples:
      vramplan probe --quick
      vramplan probe llama-3.2-1b --method qlora --seq-len 1024
      vramplan probe llama-3.1-8b --boundary --memory-limit 16GiB --output runs.jsonl
      vramplan probe --num-gpus 2 --parallel fsdp
      vramplan probe llama-3.1-8b --method full --num-gpus 8 --parallel fsdp --alone

    Exit codes: 0 measured, and all as planned; 1 not so, or no GPU to measure on; 2 the question was wrong.
    """
    asked = _asked(config, model=model, **options)
    for name in ("gpu", "stack", "calibration", "prices"):
        if name in asked:
            raise UsageError(f"{shown(config)} names a {name}, and a probe measures what is here; leave it out")
    model = asked.pop("model", None)
    if over not in (None, "batch_size", "seq_len"):
        raise unknown("size", over, ("batch_size", "seq_len"), "--over")
    if over is not None and not boundary:
        raise UsageError("--over says what --boundary varies; add --boundary")
    from vramplan.planner import report, report_probe
    from vramplan.probes import probe as probing

    budget_s = probing.budget_s(model, asked, quick=quick, full=full)
    with report_probe.Progress(budget_s) as progress:
        found = probing.probe(
            model,
            quick=quick,
            full=full,
            memory_limit=memory_limit,
            boundary=(over or "batch_size") if boundary else None,
            alone=alone,
            snapshot=snapshot,
            output=output,
            watcher=progress,
            **asked,
        )
    if as_json:
        report.print_json(found.to_dict())
    else:
        report_probe.print_probe(found)
    return 130 if found.interrupted else 0 if found.good else 1


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


@cli.command(short_help="List what GPUs cost an hour, or fetch newer prices.")
@click.argument("words", metavar="refresh | [FILTER]...", nargs=-1)
@click.option(
    "--prices", "file", metavar="FILE", shell_complete=_files, help="A CSV file of prices, instead of the known ones."
)
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def prices(words: Sequence[str], file: str | None, as_json: bool) -> None:
    """List what an hour on a GPU costs, or those offers that every word of FILTER finds.

    A word is the start of a provider, a region, an instance or a GPU, or "spot" or "free". Prices come with
    vramplan, each with its day and source. vramplan prices refresh fetches today's through gpuhunt (pip install
    'vramplan[prices]') and keeps the cheapest of each provider, GPU and count for later. A FILE of your own has the
    columns provider, gpu, gpu_count, usd_per_hour and date, and may have region, instance, spot (yes or no),
    session_limit_s and source.

    \b
    Examples:
      vramplan prices rtx-4090
      vramplan prices aws h100 --json
    """
    from vramplan.planner import prices as known
    from vramplan.planner import report

    if words == ("refresh",):
        if file is not None:
            raise UsageError("a file of your own cannot be refreshed; leave --prices out")
        report.print_refreshed(known.refresh(), as_json)
        return
    offers, warnings = known.offers(file)
    found = known.matching(offers, words)
    if as_json:
        report.print_json(report.fields(found))
    else:
        report.print_prices(found, warnings)


def _holds(names: Iterable[str], words: Iterable[str]) -> bool:
    whole = "\n".join(names).lower()
    return all(word.lower() in whole for word in words)


def _question(config: str | None, **options: object) -> dict[str, Any]:
    """The same where a model must be named in one of them."""
    asked = _asked(config, **options)
    if "model" not in asked:
        raise UsageError("no model is named; add one, such as vramplan llama-3.1-8b (MODEL)")
    return asked


def _asked(config: str | None, **options: object) -> dict[str, Any]:
    """What the command line says, before what the profile file says."""
    said = {name: value for name, value in options.items() if value is not None}
    return said if config is None else _profile(config) | said


def _profile(file: str) -> dict[str, Any]:
    """The options of a profile file, by their names; `model`, `gpu` and `stack` may stand there too."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    from vramplan.planner.files import read_text

    text = read_text(file, "a TOML file of options", "--config", _LARGEST_PROFILE)
    try:
        profile = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        wrong = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deeply"
        raise UsageError(f"{shown(file)} is no TOML: {wrong} (--config)") from None
    for name in profile:
        if name not in _PLANNED:
            raise unknown(f"option in {shown(file)}:", name, _PLANNED, "--config")
    return profile


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
        code = cli.main(words, prog_name="vramplan", standalone_mode=False, obj=words) or 0
        sys.stdout.flush()
    except UsageError as error:
        report.print_error(f"{error}{_meant_command(words) if str(error).startswith('unknown model') else ''}")
        code = 2
    except click.ClickException as error:
        report.print_error(error.format_message())
        code = 2
    except Failure as error:
        report.print_error(str(error))
        code = 1
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader has seen enough (`| head`), and nothing is wrong
        code = 0
        _close_stdout()
    except OSError as error:
        report.print_error(f"cannot write the answer: {reason(error)}")
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
