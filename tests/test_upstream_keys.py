"""What upstream's step, loop and evaluation do by a key of the configuration is done by ours, refused or waived.

The pinned package is parsed: from the functions that are replaced here, through every function that they call, each key
that is read is listed. Functions that our code calls, too, read their keys by themselves.
"""

import ast
import collections
import functools
import importlib.util
import pathlib
from collections.abc import Iterable, Iterator

from conftest import ROOT
from test_upstream import uses

from MaxText import upstream
from MaxText.config.checks import REFUSED_WITH_KD

Function = tuple[str, str]  # module, name

PRE_TRAIN = "maxtext.trainers.pre_train.train"
STEPS = {(PRE_TRAIN, name) for name in ("loss_fn", "train_step", "eval_step")}  # ours with use_kd=true
LOOP = {(PRE_TRAIN, name) for name in ("run", "train_loop")}  # ours in any case
OURS = ("train.py", "upstream.py", "loop", "models", "data")  # where that is

# Packages and keys that take effect with another key alone -> that key, which is refused.
PARTS = {
    "maxtext.trainers.diloco": "enable_diloco",
    "maxtext.utils.mllog_utils": "enable_mllog",
    "block_diffusion_logit_alignment": "training_objective",
    "first_phase_ragged_buffer_factor": "moe_dropless_fallback",
    "indexer_loss_scaling_factor": "use_indexer",
    "indexer_sparse_training": "use_indexer",
    "ragged_buffer_factor": "te_moe_block",
    "retry_dropless_first_steps": "moe_dropless_fallback",
    "retry_num_moe_token_chunks": "moe_dropless_fallback",
    "te_ep_overflow_check_every_n_steps": "te_moe_block",
}
WAIVED = {
    "debug_sharding": "it logs how cross-entropy is laid out, which no array of ours is",
    "lora": "lora.enable_lora=true is refused in any case: no step of the engine's pretraining trains adapters",
    "num_vocab_tiling": "blocks need no tiling, and the switch is set for them (heads.ends_in_hidden_states)",
    "vocab_tiling_ag_once": "how tiles gather the head; blocks gather it as heads.Layout decides",
}


class Module:
    """A module of the engine's: its functions and methods, and what its names are imported from."""

    def __init__(self, name: str):
        self.name = name
        file = file_of(name)
        tree = ast.parse(file.read_text()) if file else ast.Module([], [])
        self.functions: dict[str, ast.FunctionDef] = {}
        for node in tree.body:
            for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(inner, ast.FunctionDef):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    self.functions[owner + inner.name] = inner
        self.imported = dict(imported(tree))

    def called(self, function: str) -> Iterator[Function]:
        """The engine's functions that a function names, whether to call them or to hand them on."""
        for node in ast.walk(self.functions[function]):
            if isinstance(node, ast.Name) and (node.id in self.imported or self.owns(node.id)):
                yield self.imported.get(node.id, (self.name, node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, member = self.imported.get(node.value.id, ("", ""))
                if module and not member:
                    yield module, node.attr

    def owns(self, name: str) -> bool:
        return any(function.split(".")[0] == name for function in self.functions)


def file_of(name: str) -> pathlib.Path | None:
    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.origin is not None
    path = pathlib.Path(spec.origin).parents[1].joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imported(tree: ast.AST) -> Iterator[tuple[str, Function]]:
    """Name -> the module and, where it is not the module itself, the member of it that the name stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maxtext"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield alias.asname or alias.name, (whole, "") if file_of(whole) else (str(node.module), alias.name)


module = functools.cache(Module)


def reached(roots: Iterable[Function]) -> set[Function]:
    """The functions, methods among them, that are called from the roots, through others, too."""
    todo, found = list(roots), set()
    while todo:
        where, name = todo.pop()
        own = module(where)
        for function in own.functions:
            if (function == name or function.startswith(f"{name}.")) and (where, function) not in found:
                found.add((where, function))
                todo += own.called(function)
        if name in own.imported:  # handed on by a module that defines it not
            todo.append(own.imported[name])
    return found


def keys_of(node: ast.AST) -> Iterator[str]:
    """What is read of a configuration, as an attribute or by getattr."""

    def is_config(value: ast.AST) -> bool:
        text = ast.unparse(value)
        return text.split(".")[-1] in ("config", "cfg", "teacher_config") and text != "jax.config"

    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and is_config(inner.value):
            yield inner.attr
        elif isinstance(inner, ast.Call) and ast.unparse(inner.func) == "getattr" and is_config(inner.args[0]):
            yield str(getattr(inner.args[1], "value", ""))


def our_files() -> list[pathlib.Path]:
    home = ROOT / "MaxText"
    return [file for file in home.rglob("*.py") if file.relative_to(home).parts[0] in OURS]


@functools.cache
def called_by_us() -> set[Function]:
    """Upstream's functions that our code calls, and those that these call; not what is ours instead."""
    door = dict(imported(ast.parse((ROOT / "MaxText/upstream.py").read_text())))
    chains = {tuple(use.split(".")) for file in our_files() for use in uses(file)}
    roots = {(door[chain[0]][0], chain[1]) for chain in chains if chain[0] in door}
    return reached(roots - STEPS - LOOP)


def read_by(functions: set[Function]) -> dict[str, set[str]]:
    """Key -> who reads it of these functions, without those that our code calls as well."""
    found = collections.defaultdict(set)
    for where, name in functions - called_by_us():
        if not any(where.startswith(package) for package in PARTS):
            for key in keys_of(module(where).functions[name]):
                found[key].add(f"{where.split('.')[-1]}.{name}")
    return found


@functools.cache
def carried() -> set[str]:
    """The keys that our own step and loop read."""
    return {key for file in our_files() for key in keys_of(ast.parse(file.read_text()))}


def test_what_the_engines_step_and_loop_do_by_a_key_is_done_refused_or_waived():
    keys = read_by(reached(STEPS | LOOP))
    assert len(keys) > 50, "the engine's functions are not found"
    accounted = carried() | REFUSED_WITH_KD.keys() | PARTS.keys() | WAIVED.keys()
    missing = {key: sorted(readers) for key, readers in keys.items() if key not in accounted}
    assert not missing


def test_what_is_a_part_of_another_key_is_of_one_that_is_refused():
    assert set(PARTS.values()) <= REFUSED_WITH_KD.keys()


def test_nothing_is_waived_that_the_engine_no_longer_reads_or_that_is_carried():
    read = read_by(reached(STEPS | LOOP))
    for key in (*WAIVED, *(key for key in PARTS if not key.startswith("maxtext."))):
        assert key in read and key not in carried() and key not in REFUSED_WITH_KD, key


def test_what_the_loop_alone_does_by_a_key_is_done_or_left_to_the_engines_loop_without_a_teacher():
    in_loop = read_by(reached(LOOP) - reached(STEPS)).keys()
    refused = (in_loop & REFUSED_WITH_KD.keys()) | {PARTS[key] for key in in_loop & PARTS.keys()}
    assert refused - carried() <= upstream.OWN_LOOP.keys()
