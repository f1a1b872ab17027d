"""PTX text -> one kernel: its instructions, registers, parameters, shared variables and labels.

Names that an inline-assembly block `{ ... }` declares are renamed by block, so that every name is unique.
Source: PTX ISA 4 (syntax), 5.2-5.4 (types, variables), 6.4 (operands).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .bits import PtxError, width


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """%tid.x, %laneid, ..."""

    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int  # two's complement; a float literal is its bit pattern


@dataclass(frozen=True)
class Symbol:
    """A parameter, shared variable or label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Pair:
    """first|second, two destinations"""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!predicate"""

    operand: Register


Operand = Register | Special | Immediate | Symbol | Vector | Address | Pair | Not | None  # None: the sink `_`


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Not | None
    text: str


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int  # bytes from the start of the parameters
    size: int  # bytes


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # name -> bits; a predicate has 1
    shared: dict[str, int] = field(default_factory=dict)  # name -> offset in bytes
    static_shared: int = 0  # bytes; dynamic shared memory follows
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index into instructions


SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|lanemask_(?:eq|lt|le|gt|ge)|smid|nsmid|clock(?:64)?"
    r"|globaltimer|total_smem_size|dynamic_smem_size)|WARP_SZ"
)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(\[\s*(\d*)\s*\])?")


def entries(ptx: str) -> list[str]:
    """Names of the kernels of a module."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


@functools.lru_cache(maxsize=8)  # a kernel runs under several schedules; nothing changes what is parsed
def parse(ptx: str, name: str) -> Kernel:
    """The kernel `name` of a module. Raises PtxError where the text is not understood."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"(?m)^[ \t]*\.(?:loc|file)\b[^\n]*", "", ptx)
    head = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)[^{{]*\{{", ptx)
    if head is None:
        raise PtxError(f"kernel: expected one of {', '.join(entries(ptx))}, got {name}")
    body = _body(ptx, head.end())
    kernel = Kernel(name, _parameters(head[1]))
    module_variables = (SHARED.search(line) for line in ptx.replace(body, "").split(";"))
    for match in module_variables:
        if match and re.search(rf"(?<![\w$]){re.escape(match[3])}(?![\w$])", body):
            _declare_shared(kernel, match)
    _Body(kernel).read(body)
    return kernel


def _body(ptx: str, start: int) -> str:
    """The text between the brace before `start` and the one that closes it."""
    depth = 1
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return ptx[start : start + brace.start()]
    raise PtxError("kernel: its closing brace is missing")


def _parameters(text: str) -> list[Parameter]:
    parameters: list[Parameter] = []
    end = 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = re.search(r"\.((?:[usbf]|bf)\d+)\b", declaration)
        name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?$", declaration)
        if match is None or name is None:
            raise PtxError(f"parameter: not understood: {declaration}")
        element, count = width(match[1]) // 8, int(name[2] or 1)
        align = re.search(r"\.param\s+\.align\s+(\d+)", declaration)
        start = -(-end // (step := int(align[1]) if align else element)) * step
        parameters.append(Parameter(name[1], start, element * count))
        end = start + element * count
    return parameters


def _declare_shared(kernel: Kernel, match: re.Match) -> None:
    align, kind, name, array, count = match.groups()
    element = width(kind) // 8
    step = int(align or element)
    start = -(-kernel.static_shared // step) * step
    kernel.shared[name] = start
    kernel.static_shared = start + element * (int(count or 0) if array else 1)


@dataclass
class _Scope:
    suffix: str
    names: dict[str, str] = field(default_factory=dict)  # register -> type
    prefixes: dict[str, str] = field(default_factory=dict)  # %r of %r<8> -> type


class _Body:
    """Reads the statements of a kernel into it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes = [_Scope("")]
        self.opened = 0
        self.local_labels: list[tuple[str, str]] = []

    def read(self, body: str) -> None:
        for statement in _statements(body):
            if statement == "{":
                self.opened += 1
                self.scopes.append(_Scope(f"@{self.opened}"))
            elif statement == "}":
                self.scopes.pop()
            elif statement.endswith(":"):
                label = statement[:-1]
                self.kernel.labels[self._label(label, body)] = len(self.kernel.instructions)
            elif statement.startswith(".reg"):
                self._registers(statement)
            elif ".shared" in statement and (match := SHARED.match(statement)):
                _declare_shared(self.kernel, match)
            elif statement.startswith((".pragma", ".section", ".maxntid", ".reqntid")):
                continue
            elif statement.startswith("."):
                raise PtxError(f"directive: not understood: {statement}")
            else:
                self.kernel.instructions.append(self._instruction(statement, body))

    def _label(self, label: str, body: str) -> str:
        """A label of an inline block may occur in several: rename it then."""
        several = len(re.findall(rf"(?m)(?:^|[\s;{{]){re.escape(label)}\s*:(?!:)", body)) > 1
        return label + self.scopes[-1].suffix if several else label

    def _registers(self, statement: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL)
        if match is None:
            raise PtxError(f"registers: not understood: {statement}")
        for name in (part.strip() for part in match[2].split(",")):
            if numbered := re.fullmatch(r"(.*)<\d+>", name):
                self.scopes[-1].prefixes[numbered[1]] = match[1]
            else:
                self.scopes[-1].names[name] = match[1]

    def _instruction(self, statement: str, body: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)\s*([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
        if match is None:
            raise PtxError(f"instruction: not understood: {statement}")
        negated, guard, opcode, rest = match.groups()
        guarded = self._operand("!" * bool(negated) + guard) if guard else None
        if guard and not isinstance(guarded, Register | Not):
            raise PtxError(f"guard: expected a predicate in {statement}")
        if opcode.startswith("bra"):
            operands: tuple[Operand, ...] = (Symbol(self._label(rest.strip(), body)),)
        else:
            operands = tuple(self._operand(part) for part in _split(rest))
        return Instruction(opcode, operands, guarded, " ".join(statement.split()))  # type: ignore[arg-type]

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            return Address(self._operand(base), int(offset.strip() or "0", 0))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            register = self._operand(text[1:])
            assert isinstance(register, Register)
            return Not(register)
        if SPECIAL.fullmatch(text):
            return Special(text)
        if literal := re.fullmatch(r"0[fd]([0-9a-fA-F]{8,16})", text):
            return Immediate(int(literal[1], 16))
        if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(_integer(text.rstrip("U")))
        return self._name(text)

    def _name(self, text: str) -> Operand:
        prefix = text.rstrip("0123456789")
        for scope in reversed(self.scopes):
            kind = scope.names.get(text) or (scope.prefixes.get(prefix) if prefix != text else None)
            if kind:
                name = text + scope.suffix
                self.kernel.registers[name] = width(kind)
                return Register(name)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise PtxError(f"operand: not understood: {text}")


def _integer(text: str) -> int:
    """Decimal, hexadecimal or, with a leading 0, octal."""
    octal = re.fullmatch(r"(-?)0([0-7]+)", text)
    return int(octal[1] + octal[2], 8) if octal else int(text, 0)


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolon, labels with their colon, and braces that open and close a block."""
    text = ""
    for piece in re.split(r"([;{}]|(?<!:):(?!:))", body):
        if piece == ";":
            if text.strip():
                yield text.strip()
            text = ""
        elif piece in ("{", "}") and not text.strip():
            yield piece
        elif piece == ":" and re.fullmatch(r"\s*[\w$]+\s*", text):
            yield text.strip() + ":"
            text = ""
        else:
            text += piece
    if text.strip():
        raise PtxError(f"statement: its semicolon is missing: {text.strip()}")


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets."""
    return [part for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]
