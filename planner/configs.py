"""A run that another framework's config describes, as options of a plan: each with the key it came from.

`frameworks` and `launchers` hold the keys; here files are read, the framework is found by its keys, and what no plan
can follow is refused by name.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.planner.documents import Computed, Document, load
from vramplan.planner.errors import UsageError, printable, shown, unknown
from vramplan.planner.frameworks import (
    AXOLOTL,
    LLAMAFACTORY,
    PEFT_DEFAULT,
    PEFT_TARGETS,
    SETTLED,
    SFT,
    TRANSFORMERS,
    TRL,
    Framework,
    is_on,
    same,
)
from vramplan.planner.launchers import ACCELERATE, DEEPSPEED
from vramplan.planner.training import OPTIONS, PHASES, read_value, typed, unused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from vramplan.planner.frameworks import Rule

_LAUNCHERS = (ACCELERATE, DEEPSPEED)
FRAMEWORKS = {each.name: each for each in (AXOLOTL, LLAMAFACTORY, TRL, TRANSFORMERS, *_LAUNCHERS)}

COMMAND_LINE = "the command line"
_COMMENT = "the comment of the export"
_MOST_FILES = 50  # of a folder
_LONGEST = 100  # characters of a key that are looked at


class Refusal(NamedTuple):
    """Why no plan can follow a key; `whole` says that the text is a sentence of its own, with the way to mend it."""

    text: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What files say of a run.

    `options` go to `plan`; `sources` says where each came from. `evidence` are keys that only this framework has,
    `refused` keys that no plan can follow, each with the reason, `notes` what a plan does otherwise, `unknown` keys
    that the framework lacks, `harmless` keys without an effect on memory. `launcher` is the reading of the file that
    launches the run, where a training file is beside it; all else is of both.
    """

    files: tuple[str, ...]
    framework: Framework
    evidence: tuple[str, ...]
    model: str
    options: dict[str, Any]
    sources: dict[str, str]
    refused: Mapping[str, Refusal]
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    launcher: Reading | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading as JSON."""
        return {
            "files": list(self.files),
            "framework": self.framework.name,
            "launcher": self.launcher.framework.name if self.launcher else None,
            "evidence": list(self.evidence),
            "options": {
                name: {"value": value, "from": self.sources[name]}
                for name, value in ({"model": self.model} | self.options).items()
            },
            "notes": list(self.notes),
            "unknown": list(self.unknown),
            "harmless": list(self.harmless),
        }


def read(
    files: Sequence[str], *, framework: str | None = None, ignore: Collection[str] = (), **asked: object
) -> Reading:
    """What a config, a script, or TrainingArguments with an adapter's config say of a run; a launcher's may be beside.

    `framework` settles whose keys they are; keys in `ignore` are read as if they were not there; `asked` are options,
    and `model`, that go before what files say. Raises UsageError for files that cannot be read, for keys that change
    memory as no plan can follow, for files that contradict each other, and where the framework is not clear.
    """
    if framework is not None and framework not in FRAMEWORKS:
        raise unknown("framework", framework, FRAMEWORKS, "--from")
    asked = {name: value for name, value in asked.items() if value is not None}
    documents = [document for file in files for document in _documents(file)]
    if not documents:
        raise UsageError("no file is named; name a config, or a folder that holds one (FILE)")
    launchers = [each for each in documents if len(documents) > 1 and _launches(each)]
    if len(launchers) > 1:
        raise UsageError(f"{_names(launchers)} each say how GPUs share a run; name one of them (FILE)")
    training = _part([each for each in documents if each not in launchers], framework)
    if launchers:
        launcher = _part(launchers, None)
        reading = _launched(training, launcher, ignore, asked)
    else:
        launcher = training
        reading = training.interpret(ignore, asked)
        _refuse(reading, training.where)
    if reading.options.get("parallel") not in (None, "none") and "num_gpus" not in reading.options:
        key = "num_processes to it, or " * (launcher.framework is ACCELERATE)
        raise UsageError(f"{launcher.where} does not say how many GPUs there are; add {key}--num-gpus")
    return reading


class _Part(NamedTuple):
    """Files that are read as one, and whose keys theirs are."""

    documents: Sequence[Document]
    values: dict[str, Any]
    framework: Framework
    evidence: tuple[str, ...]
    where: str

    def interpret(self, ignore: Collection[str], asked: Mapping[str, Any], model: str | None = None) -> Reading:
        """What they say; `model` is another file's word, for where they name none."""
        try:
            marked = _marked(" ".join(each.marked for each in self.documents))
            return interpret(
                self.values,
                self.framework,
                marked=({"model": model} if model else {}) | marked,
                ignore=ignore,
                asked=asked,
                files=tuple(each.path for each in self.documents),
                evidence=self.evidence,
            )
        except UsageError as error:
            raise UsageError(f"{self.where}: {error}") from None

    def knows(self, key: str) -> bool:
        """Whether the framework or these files have the key."""
        return key in self.values or key in self.framework.known


def _part(documents: Sequence[Document], framework: str | None) -> _Part:
    values: dict[str, Any] = {}
    for document in documents:
        values |= document.values
    where = _names(documents)
    found, evidence = _framework(values, documents, framework, where)
    if len(documents) > 1 and (len(documents) > 2 or found.name != "transformers" or not _beside(documents, framework)):
        raise UsageError(
            f"{where} are read together only as TrainingArguments and an adapter's config, or one of them as what "
            "launches the other's run; name one (FILE)"
        )
    return _Part(documents, values, found, evidence, where)


def _beside(documents: Sequence[Document], framework: str | None) -> bool:
    """Whether two files can be parts of one run: JSON, or one script and JSON."""
    kinds = [each.kind for each in documents]
    return kinds.count("python") < 2 and (framework is not None or {"json", "python"}.issuperset(kinds))


def _names(documents: Sequence[Document]) -> str:
    return " and ".join(shown(each.path) for each in documents)


def _refuse(reading: Reading, where: str) -> None:
    """Raises UsageError where the reading has keys that no plan can follow."""
    if whole := [each.text for each in reading.refused.values() if each.whole]:
        raise UsageError(f"{where}: {'; '.join(whole)}")
    for key, (text, _) in reading.refused.items():
        others = [each for each in reading.refused if each != key]
        more = f" (so it is with {', '.join(others)})" if others else ""
        raise UsageError(
            f"{where}: {key} cannot be planned: {text}; change it, or leave it out by --ignore {key}{more}"
        )


def interpret(
    values: Mapping[str, Any],
    framework: Framework,
    *,
    marked: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    asked: Mapping[str, Any] | None = None,
    files: tuple[str, ...] = (),
    evidence: tuple[str, ...] = (),
) -> Reading:
    """The same of a framework's keys and values; `marked` are options that an exported file says beside its keys."""
    asked, marked = dict(asked or {}), dict(marked or {})
    flat = _flat(values, framework, ignore)
    for key in ignore:
        if key not in values and key not in framework.known:
            raise unknown("key", key, dict.fromkeys(map(printable, (*values, *flat))), "--ignore")
    given = {key: value for key, value in flat.items() if value is not None or key in framework.nullable}
    view = {key: value for key, value in framework.defaults.items() if not _ignored(key, ignore)} | given
    view |= _overridden(framework, asked)
    model = _model(framework, given, marked, asked)
    options, sources = _options(framework, given, view, marked, asked, model)
    refused, notes = _remarks(framework, given, view, asked)
    strangers = [key for key in given if key not in framework.known and not key.startswith("_")]
    if any(isinstance(value, Computed) or key.isupper() for key, value in given.items()):
        strangers = [key for key in strangers if not key.isupper()]
    return Reading(
        files=files,
        framework=framework,
        evidence=evidence,
        model=model,
        options=options,
        sources={"model": COMMAND_LINE if "model" in asked else _model_key(framework, given)} | sources,
        refused=refused,
        notes=tuple(f"{key}: {text}" for key, text in notes.items()),
        unknown=tuple(_unknown(key, framework) for key in strangers),
        harmless=tuple(sorted(key for key in given if key in framework.harmless and not key.endswith("()"))),
    )


def _ignored(key: str, ignore: Collection[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in ignore)


def _flat(values: Mapping[str, Any], framework: Framework, ignore: Collection[str]) -> dict[str, Any]:
    """The keys and values that are not ignored, those below the framework's nested mappings by their paths."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        parent = key.partition(".")[0]
        if parent != key and parent in framework.nested:
            raise UsageError(f"{shown(key)} stands there as one key, with a dot; write the keys of {parent} below it")
        for path, each in _below(key, value, framework, ignore):
            if path in flat:
                raise UsageError(f"{printable(path)} stands there twice, with its prefix and without; leave one out")
            flat[path] = each
    return flat


def _below(path: str, value: Any, framework: Framework, ignore: Collection[str]) -> Iterator[tuple[str, Any]]:
    if _ignored(path, ignore):
        return
    if path not in framework.nested or value is None:
        yield path, value
        return
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} is {shown(value)}; it must be a mapping: write its keys and values below it, "
            f"or leave it out by --ignore {path}"
        )
    prefix = framework.nested[path]
    for key, each in value.items():
        name = (key if isinstance(key, str) else shown(key))[:_LONGEST]
        full = name if name.startswith(prefix.rstrip("_")) else prefix + name
        yield from _below(f"{path}.{full}", each, framework, ignore)


# ------------------------------------------------------------------------------------------------------------ the files


def _documents(file: str) -> list[Document]:
    path = Path(file)
    try:
        folder = path.is_dir()
    except (OSError, ValueError):
        folder = False
    if not folder:
        return [load(file)]
    candidates = sorted(each for each in path.iterdir() if each.suffix == ".json" and each.is_file())[:_MOST_FILES]
    found = []
    for each in candidates:
        try:
            document = load(each)
        except UsageError:  # a tokenizer's, an index of weights: larger, or no options by name
            continue
        if "peft_type" in document.values or _is_training_arguments(document.values):
            found.append(document)
    if not found:
        pickled = ", and training_args.bin is a pickle, which is never read" * (path / "training_args.bin").exists()
        raise UsageError(
            f"{shown(file)} holds no TrainingArguments or adapter_config.json as JSON{pickled}; name a file (FILE)"
        )
    return found


def _launches(document: Document) -> bool:
    """Whether a file is a launcher's by its keys."""
    if document.kind not in ("yaml", "json"):
        return False
    try:
        found, _ = _framework(document.values, [document], None, "")
    except UsageError:
        return False
    return found in _LAUNCHERS


def _is_training_arguments(values: Mapping[str, Any]) -> bool:
    return len({"output_dir", "per_device_train_batch_size", "optim", "learning_rate"} & set(values)) > 1


def _framework(
    values: Mapping[str, Any], documents: Sequence[Document], name: str | None, where: str
) -> tuple[Framework, tuple[str, ...]]:
    """Whose keys these are, and the keys that say so: those that no other framework has."""
    kind = documents[0].kind
    if kind == "python":
        calls = tuple(key.removesuffix("()") for key in values if key.endswith("()"))
        if not calls:
            raise UsageError(f"{where} calls neither TrainingArguments nor SFTConfig; there is nothing to read (FILE)")
        if name not in (None, "transformers", "trl"):
            raise UsageError(f"{where} is a script, which is read as transformers' or trl's; leave out --from {name}")
        return SFT if name == "trl" else _variant(TRANSFORMERS, values, kind), calls
    if name is not None:
        return _variant(FRAMEWORKS[name], values, kind), ("--from",)
    known = {each.name: each.known for each in FRAMEWORKS.values()}
    known["transformers"] = SFT.known if kind == "json" else frozenset()  # nobody has these as YAML,
    known["deepspeed"] = DEEPSPEED.known if kind == "json" else frozenset()  # nor these
    own: dict[str, list[str]] = {}
    for key in values:
        holders = [each for each, keys in known.items() if key in keys]
        if len(holders) == 1:
            own.setdefault(holders[0], []).append(key)
    if len(own) > 1:
        said = "; ".join(f"{each} by {', '.join(keys[:3])}" for each, keys in own.items())
        raise UsageError(f"{where} could be of more than one framework: {said}; say which by --from")
    if own:
        [(winner, keys)] = own.items()
        return _variant(FRAMEWORKS[winner], values, kind), tuple(keys[:4])
    if kind == "json" and _is_training_arguments(values):
        return _variant(TRANSFORMERS, values, "json"), ("TrainingArguments' keys",)
    names = "|".join(FRAMEWORKS)
    raise UsageError(f"{where} has no key that tells whose config it is; say which by --from {names}")


def _variant(framework: Framework, values: Mapping[str, Any], kind: str) -> Framework:
    """SFTConfig's defaults in the place of TrainingArguments', where trl's trainer is used."""
    if framework is not TRANSFORMERS:
        return framework
    if kind == "python":
        sft = "SFTConfig()" in values or values.get("trainer") == "SFTTrainer"
    else:
        sft = any(key in SFT.known - TRANSFORMERS.known or key == "max_length" for key in values)
    return SFT if sft else framework


def _marked(text: str) -> dict[str, Any]:
    """The options of an exported file's comment, as they are typed; the one word that is no option is the model."""
    found: dict[str, Any] = {}
    flags = {option.flag: option for option in OPTIONS.values()}
    try:
        words = iter(shlex.split(text))
    except ValueError:
        words = iter(())
    for word in words:
        option = flags.get(word) or flags.get(word.replace("--no-", "--", 1))
        if option is None:
            if word.startswith("-") or "model" in found:
                raise unknown("option in the comment of an export:", word, flags, "FILE")
            found["model"] = word
        elif option.kind == "flag":
            found[option.name] = not word.startswith("--no-")
        else:
            found[option.name] = next(words, "")
    return found


# ------------------------------------------------------------------------------------- a training file and its launcher


def _launched(training: _Part, launcher: _Part, ignore: Collection[str], asked: Mapping[str, Any]) -> Reading:
    """A run by its training file, on the GPUs that the launcher's file says.

    The launcher's options go before the training file's, as they do where they run, or contradict them.
    """
    launch = launcher.interpret([key for key in ignore if launcher.knows(key)], dict(asked) | {"model": "given"})
    _refuse(launch, launcher.where)
    left = [key for key in ignore if training.knows(key) or not launcher.knows(key)]
    comment = _marked(launcher.documents[0].marked)
    alone = training.interpret(left, asked, comment.get("model"))
    by_keys = {name: value for name, value in launch.options.items() if launch.sources[name] != _COMMENT}
    stronger, notes = _stronger(by_keys, launch, alone, launcher, training, asked)
    reading = training.interpret(left, dict(asked) | stronger, comment.get("model"))
    # a launcher that only starts processes leaves it to the training file's own deepspeed or fsdp
    shared = launch.options.get("parallel") not in (None, "none", "ddp")
    _refuse(reading if shared else alone, training.where)
    options, sources = dict(reading.options), dict(reading.sources)
    sources |= {name: launch.sources[name] for name in stronger if name not in asked}
    without = unused(options.get("method", "qlora"), options.get("parallel", "none"), PHASES)
    if "seq_len" in options:  # what an example has is of the comment's own length, if of any
        comment.pop("tokens_per_example", None)
    for name, value in comment.items():  # of an export: what neither file's keys say
        if name in OPTIONS and name not in options and name not in without:
            options[name], sources[name] = value, _COMMENT
    return replace(
        reading,
        files=(*reading.files, *launch.files),
        options={name: options[name] for name in OPTIONS if name in options},
        sources=sources,
        notes=(*reading.notes, *launch.notes, *notes),
        unknown=(*reading.unknown, *launch.unknown),
        harmless=tuple(sorted({*reading.harmless, *launch.harmless})),
        launcher=launch,
    )


def _stronger(
    by_keys: dict[str, Any],
    launch: Reading,
    alone: Reading,
    launcher: _Part,
    training: _Part,
    asked: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The launcher's options that go before the training file's, and what to say of those that differ."""
    stronger, notes = dict(by_keys), []
    zero = str(launch.options.get("parallel")).startswith("zero")
    for name, value in by_keys.items():
        theirs = alone.options.get(name)
        differ = theirs not in (None, value)
        by, beside = launch.sources[name], alone.sources.get(name, f"{training.framework.title}'s own")
        if name in asked:
            continue
        if name == "gradient_checkpointing":
            if theirs:  # transformers/trainer.py: "... training argument can't both be set to True"
                raise UsageError(
                    f"{training.where} ({beside}) and {launcher.where} ({by}) both checkpoint the layers, and "
                    "transformers refuses that; switch one of them off"
                )
        elif name == "mixed_precision" and _own_precision(training, launcher, theirs):
            del stronger[name]
            if theirs != value:
                notes.append(f"{by}: that of {training.where} ({beside}) goes before it")
        elif not differ or (name == "mixed_precision" and launcher.framework is ACCELERATE and not zero):
            continue
        elif name == "optimizer":
            notes.append(f"{beside}: DeepSpeed's own optimizer ({by}) goes before it")
        else:  # transformers/integrations/deepspeed.py: "Please correct the following ... values that mismatch"
            raise UsageError(
                f"{name} is {typed(theirs)} in {training.where} ({beside}) and {typed(value)} in {launcher.where} "
                f"({by}), and transformers refuses that; set both alike, or name {OPTIONS[name].flag}"
            )
    return stronger, notes


def _own_precision(training: _Part, launcher: _Part, theirs: Any) -> bool:
    """Whether autocast's dtype is the training file's, whatever accelerate's says.

    transformers/training_args.py takes accelerate's where it has none of its own; axolotl/utils/trainer.py never does.
    """
    return launcher.framework is ACCELERATE and (training.framework is AXOLOTL or theirs not in (None, "no"))


# ---------------------------------------------------------------------------------------------------------- the options


def _options(
    framework: Framework,
    given: Mapping[str, Any],
    view: Mapping[str, Any],
    marked: Mapping[str, Any],
    asked: Mapping[str, Any],
    model: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every option that the command line, a comment, keys or the framework's defaults decide, and which of these."""
    options: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in OPTIONS:  # the method comes first, and how GPUs share the run before what belongs to that
        without = unused(options.get("method", "qlora"), options.get("parallel", "fsdp"), PHASES)
        if name in without and name not in asked:
            continue
        for said, source in ((asked, COMMAND_LINE), (marked, _COMMENT)):
            if said.get(name) is not None:
                options[name], sources[name] = said[name], source
                break
        else:
            value, source = _by_key(name, framework, given, view, model)
            if value is not None:
                options[name], sources[name] = value, source
    return options, sources


def _overridden(framework: Framework, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the command line goes before: other options follow from the batch, for example."""
    return {
        rule.keys[0]: read_value(OPTIONS[name], asked[name])
        for name, rule in framework.rules.items()
        if (rule.value is same or rule.stands) and asked.get(name) is not None
    }


def _by_key(
    name: str, framework: Framework, given: Mapping[str, Any], view: Mapping[str, Any], model: str
) -> tuple[Any, str]:
    if name in framework.fixed:
        value, why = framework.fixed[name]
        return value, why
    rule = framework.rules.get(name)
    if rule is None:
        return None, ""
    keys = [key for key in rule.keys if key in given]
    if lines := [given[key].line for key in keys if isinstance(given[key], Computed)]:
        raise UsageError(
            f"{keys[0]} is worked out in line {lines[0]}, which only running it would show; name {OPTIONS[name].flag}"
        )
    source = ", ".join(_label(key) for key in keys) or f"default of {_label(rule.keys[0])}"
    try:
        value = rule.value(*(view.get(key) for key in (*rule.keys, *rule.more)))
        if value == PEFT_DEFAULT:
            value, source = _peft_targets(model), f"PEFT's default for this model, without {rule.keys[0]}"
        value = None if value is None else read_value(OPTIONS[name], value)
    except UsageError as error:
        raise UsageError(_with_key(str(error), rule, ", ".join(keys) or rule.keys[0])) from None
    if rule.assumed:
        source = f"assumed from {', '.join(map(_label, keys or rule.keys))}"
    return value, source


def _with_key(text: str, rule: Rule, otherwise: str) -> str:
    """An error with the key whose value is wrong, by its path: the one that it names, else those of the option."""
    for key in (*rule.keys, *rule.more):
        for name in (key, key.rpartition(".")[2]):
            for before in ("", "unknown "):
                if text.startswith(f"{before}{name} "):
                    return f"{before}{key}{text[len(before) + len(name) :]}"
    return f"{otherwise}: {text}"


def _label(key: str) -> str:
    return key.replace("()", "")


def _peft_targets(model: str) -> tuple[str, ...]:
    from vramplan.planner.sources import resolve_model

    kind = resolve_model(model).config.get("model_type")
    if kind not in PEFT_TARGETS:
        raise UsageError(f"PEFT has no default modules for {shown(kind)}; name them (--target-modules)")
    return PEFT_TARGETS[kind]


def _model_key(framework: Framework, given: Mapping[str, Any]) -> str:
    return next((key for key in framework.model if given.get(key)), _COMMENT)


def _model(framework: Framework, given: Mapping[str, Any], marked: Mapping[str, Any], asked: dict[str, Any]) -> str:
    if asked.get("model") is not None:
        return str(asked["model"])
    found = given.get(_model_key(framework, given), marked.get("model"))
    if isinstance(found, Computed):
        raise UsageError(
            f"the model is worked out in line {found.line}, which only running it would show; name --model"
        )
    if not isinstance(found, str):
        keys = " or ".join(framework.model) or "it"
        raise UsageError(f"{keys} names no model; name one by --model")
    return found


# ---------------------------------------------------------------------------------------------------------- the remarks


def _remarks(
    framework: Framework, given: Mapping[str, Any], view: Mapping[str, Any], asked: Mapping[str, Any]
) -> tuple[dict[str, Refusal], dict[str, str]]:
    """What is refused and what is noted, by key."""
    settled = all(asked.get(name) is not None for name in ("num_gpus", "parallel"))
    refused: dict[str, Refusal] = {}
    notes: dict[str, str] = {}
    for remark in framework.remarks:
        if remark.when is None:
            keys: Iterable[str] = (key for key in remark.keys if is_on(view.get(key)))
        else:
            keys = (next((key for key in remark.keys if key in given), remark.keys[0]),) if remark.when(view) else ()
        for key in keys:
            if remark.settled and settled:
                notes[key] = SETTLED
            elif remark.refused:
                whole = remark.whole(given) if remark.whole else None
                refused[key] = Refusal(remark.text) if whole is None else Refusal(whole, whole=True)
            else:
                notes[key] = remark.text
    return refused, notes


def _unknown(key: str, framework: Framework) -> str:
    from difflib import get_close_matches

    matter = {each for rule in framework.rules.values() for each in rule.keys}
    mapping = key.rpartition(".")[0]
    before = f"{mapping}.{framework.nested[mapping]}" if mapping in framework.nested else ""
    typed = {each.removeprefix(before) for each in framework.known if each.startswith(before) and each.islower()}
    typed = {each for each in typed if "." not in each and not each.endswith("()")}
    found = get_close_matches(key.removeprefix(before)[:_LONGEST], sorted(typed), 1, cutoff=0.8)
    close = [before + each for each in found]
    meant = f"; {close[0]}{', which decides the plan,' * (close[0] in matter)} may be meant" if close else ""
    return f"{shown(key)} is no key of {framework.title}{meant}"
