"""Files of options that others wrote: YAML, JSON, TOML, and Python scripts that are read and never run.

All are untrusted: at most 128 KiB, plain values only, no key twice, no aliases that multiply, nothing nested without
end. A script's keyword arguments are read from its syntax tree where they are written out.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.planner.errors import UsageError, shown
from vramplan.planner.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    import yaml

_LARGEST = 2**17  # bytes; PyYAML takes seconds for a file of this size, and a config is a few KiB
_MOST_NODES = 20_000  # of a YAML file, its aliases written out
# The comment in which an exported file keeps the options that its own keys cannot say.
MARK = "# vramplan options:"
_MARKED = re.compile(rf"^{re.escape(MARK)}(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Document:
    """A file's keys and values; `marked` is what its `MARK` line says, if it has one."""

    path: str
    kind: str  # "yaml", "json", "toml" or "python"
    values: dict[str, Any]
    marked: str = ""


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that a script works out, so that reading alone does not give it."""

    line: int


def load(file: str | Path, what: str = "a config", option: str = "FILE") -> Document:
    """What the file holds; its kind follows from its extension, else from its first character.

    Raises UsageError for a file that cannot be read, is too large, or is none of its kind.
    """
    text = read_text(file, what, option, _LARGEST, encoding="utf-8-sig")
    kind = _kind(Path(file), text)
    where = shown(str(file))
    try:
        values = _READERS[kind](text)
    except UsageError as error:
        raise UsageError(f"{where}: {error} ({option})") from None
    except (RecursionError, MemoryError):
        raise UsageError(f"{where} is nested too deeply ({option})") from None
    except (ValueError, SyntaxError) as error:  # of json, tomllib, ast; PyYAML's own are turned into it below
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{where} is no {_NAMES[kind]}: {reason} ({option})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{where} holds no options by name; name {what} ({option})")
    found = _MARKED.search(text) if kind in ("yaml", "python") else None
    return Document(str(file), kind, values, found[1].strip() if found else "")


def _kind(path: Path, text: str) -> str:
    by_name = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".py": "python"}
    return by_name.get(path.suffix.lower()) or ("json" if text.lstrip().startswith("{") else "yaml")


# ----------------------------------------------------------------------------------------------------- JSON, TOML, YAML


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"the key {shown(twice)} stands there twice; leave one out")
    return values


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)  # the one in C recurses without a limit
        root = loader.get_single_node()
        if root is None:
            return {}
        if _size(root, {}, set()) > _MOST_NODES:
            raise UsageError(f"it has more than {_MOST_NODES:,} values once its aliases are written out")
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (TypeError, OverflowError) as error:  # of PyYAML's constructors, for odd keys and dates
        raise ValueError(str(error)) from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """The nodes below and with `node`, each alias counted as often as it stands there."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    if id(node) in above:
        raise UsageError("an alias stands inside what it names")
    above.add(id(node))
    size = 1 + sum(_size(child, sizes, above) for child in _children(node))
    above.discard(id(node))
    sizes[id(node)] = size
    return size


def _children(node: Any) -> Iterator[yaml.Node]:
    if node.id == "sequence":
        yield from node.value
    elif node.id == "mapping":
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if key.id == "scalar" else None
            if name is not None and name in keys:
                raise UsageError(f"the key {shown(key.value)} stands there twice; leave one out")
            keys.add(name)
            yield key
            yield value


# -------------------------------------------------------------------------------------------------------------- scripts

# Calls whose keyword arguments are options, by the last part of their name.
_CALLS = frozenset(
    ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig", "LoraConfig", "BitsAndBytesConfig", "tokenizer")
)
_ENABLE = "gradient_checkpointing_enable()"  # PEFT's preparation calls it too, unless told otherwise
_UNSLOTH = ("FastLanguageModel", "FastModel")
_TRAINERS = frozenset(("Trainer", "Seq2SeqTrainer", "SFTTrainer"))


def _python(text: str) -> dict[str, Any]:
    """The keyword arguments of the calls that set up a training run, and the script's constants in capitals.

    `trainer` is the trainer's class, `model` what from_pretrained is given, `prepare_model_for_kbit_training` whether
    that is called; a name with "()" stands for a call.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of odd escapes and comparisons
        tree = ast.parse(text)
    constants = {
        target.id: _value(statement.value, {})
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    values: dict[str, Any] = {key: value for key, value in constants.items() if key.isupper()}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        for key, value in _said(call, constants):
            if key in values and values[key] != value:
                raise UsageError(
                    f"line {call.lineno} says {key} a second time, and otherwise; which is meant is unclear"
                )
            values[key] = value
    return {"prepare_model_for_kbit_training": False} | values


def _said(call: ast.Call, constants: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    name = _last(call.func)
    if name in _TRAINERS:
        yield "trainer", name
    elif name == "prepare_model_for_kbit_training":
        yield name, True
        said = {each.arg: _value(each.value, constants) for each in call.keywords}
        if (checkpointing := said.get("use_gradient_checkpointing", True)) is not False:
            yield _ENABLE, checkpointing
    elif f"{name}()" == _ENABLE:
        yield _ENABLE, True
    elif name == "setdefault" and len(call.args) == 2:  # os.environ's
        key, value = (_value(arg, constants) for arg in call.args)
        if isinstance(key, str) and key.startswith("PYTORCH_"):
            yield key, value
    elif name in _CALLS or _is_model(call):
        for keyword in call.keywords:
            if keyword.arg is None:
                raise UsageError(f"line {call.lineno} passes ** arguments, which only running it would show")
            if name != "tokenizer" or keyword.arg == "max_length":
                yield keyword.arg, _value(keyword.value, constants)
        if name in _CALLS and name != "tokenizer":
            yield f"{name}()", True
        if name == "from_pretrained" and _owner(call) in _UNSLOTH:
            yield f"{_owner(call)}()", True
        if _is_model(call) and call.args:
            yield "model", _value(call.args[0], constants)


def _is_model(call: ast.Call) -> bool:
    owner = _owner(call)
    return _last(call.func) == "from_pretrained" and (owner.endswith("ForCausalLM") or owner in _UNSLOTH)


def _owner(call: ast.Call) -> str:
    """What a method is called on, by the last part of its name."""
    return _last(call.func.value) if isinstance(call.func, ast.Attribute) else ""


def _last(node: ast.expr) -> str:
    """The last part of a dotted name; empty for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """A literal, a constant of the script's, or a dtype of torch's by its name."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and _last(node.value) == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Computed(node.lineno)


_READERS = {"json": _json, "toml": _toml, "yaml": _yaml, "python": _python}
_NAMES = {"json": "JSON", "toml": "TOML", "yaml": "YAML", "python": "Python"}
