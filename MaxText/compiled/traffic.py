"""What one instruction moves: bytes of the device's large memory, and bytes that come over the network.

Left out on purpose: that a product's tiles fetch an operand more than once.
"""

import re

from MaxText.compiled.text import Array, Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id"),
    *("replica-id", "opt-barrier", "optimization-barrier", "while", "conditional", "call", "domain"),
}
_WITHOUT_MOVING = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}  # targets of custom calls
_CUTTING = {"slice", "dynamic-slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written over a part of the first


# Of what a device sends in, how much comes back to it where g devices take part.
_RECEIVED = {
    "all-gather": lambda sent, g: sent * (g - 1),
    "all-reduce": lambda sent, g: 2 * sent * (g - 1) / g,
    "reduce-scatter": lambda sent, g: sent * (g - 1) / g,
    "all-to-all": lambda sent, g: sent * (g - 1) / g,
    "collective-permute": lambda sent, g: sent,
}


def memory(item: Instruction, where: Computation, program: Program) -> float:
    """Bytes of the large memory that it reads and writes; for a part of an array, of that part."""
    operation, target = item.operation, item.attribute("custom_call_target")[1:-1]
    if operation in _FREE or operation.endswith("-done") or target in _WITHOUT_MOVING:
        return 0
    given = [where.instructions[name] for name in item.operands]
    if operation.endswith("-start"):
        copied = item.arrays[0]  # of the tuple the first is what is made
        return (copied.bytes if _large(given[0].arrays) else 0) + (0 if copied.memory else copied.bytes)
    if operation == "fusion":
        inner = program.computations[item.called[0]]
        read = sum(_read(program, inner, place) for place, operand in enumerate(given) if _large(operand.arrays))
        makers = [inner.root] * len(item.arrays)
        if inner.root.operation == "tuple":
            makers = [inner.instructions[name] for name in inner.root.operands]
        made = zip(makers, item.arrays, strict=True)
        return read + sum(_written(program, inner, *each) for each in made if not each[1].memory)
    if operation in _CUTTING:
        return _large(item.arrays) + (item.bytes if _large(given[0].arrays) else 0)
    if operation in _IN_PLACE:
        return 2 * given[_IN_PLACE[operation]].bytes if _large(item.arrays) else 0
    return _large(item.arrays) + sum(_large(operand.arrays) for operand in given if not operand.is_tuple)


def _large(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.memory)


def _read(program: Program, inner: Computation, place: int) -> int:
    """Of a fusion's parameter."""
    parameter = inner.parameters[place]
    waiting, read = [parameter.name], 0
    while waiting:
        name = waiting.pop()
        for use in inner.uses(name):
            if use.operation == "bitcast":
                waiting.append(use.name)
            elif use.operation == "tuple" or _ends_collective(use):  # handed on as it is
                continue
            elif use.operation == "fusion":
                within = program.computations[use.called[0]]
                read += sum(_read(program, within, at) for at, given in enumerate(use.operands) if given == name)
            elif use.operation in _CUTTING and use.operands[0] == name:
                read += use.bytes
            elif not (use.operation in _IN_PLACE and use.operands[0] == name):
                return parameter.bytes
    return min(read, parameter.bytes)


def _written(program: Program, inner: Computation, maker: Instruction, made: Array) -> int:
    """Of an array of a fusion's result, by what makes it."""
    while maker.operation == "bitcast":
        maker = inner.instructions[maker.operands[0]]
    # Handed on as it is, or written since the collective that is on its way was begun.
    if maker.operation == "parameter" or "chain_id=" in maker.attributes or _ends_collective(maker):
        return 0
    if maker.operation == "fusion" and not maker.is_tuple:
        within = program.computations[maker.called[0]]
        return _written(program, within, within.root, made)
    if maker.operation in _IN_PLACE:
        return inner.instructions[maker.operands[_IN_PLACE[maker.operation]]].bytes
    return made.bytes


def _ends_collective(item: Instruction) -> bool:
    return item.attribute("custom_call_target") == '"AsyncCollectiveDone"'


def received(item: Instruction, where: Computation) -> float:
    """Bytes that a device gets of the others by one collective; 0 for other instructions."""
    rule = _RECEIVED.get(item.operation.removesuffix("-start"))
    if rule is None:
        return 0
    return rule(sum(where.instructions[name].bytes for name in item.operands), _devices(item.attributes))


def _devices(attributes: str) -> float:
    """That take part; without end where the text says that all do."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        devices = 1
        for axis in re.findall(r"'(\w+)'", found[2]):
            devices *= int(sizes[axis])
        return devices
    return float("inf")
