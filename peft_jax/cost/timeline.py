"""Estimates the time of a compiled program by going through its instructions in their order.

The instructions of a TPU's program run one after the other. Each takes the time of its slowest
part: matrix products, elementwise work, or main memory. A collective takes its time from the
program, unless the compiler has split it into a start and an end. Then it runs beside the
instructions between them, and only what they do not hide is added.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Literal

from peft_jax.cost.chips import Chip
from peft_jax.cost.collectives import Collective, read_collective
from peft_jax.cost.hlo import HOST, Computation, Instruction, Program
from peft_jax.cost.kernels import KernelWork, count_kernel
from peft_jax.cost.links import Network
from peft_jax.cost.loops import Counts, count_runs
from peft_jax.cost.parts import part_of
from peft_jax.cost.products import Product, read_product
from peft_jax.cost.traffic import FREE, Traffic, count_traffic

PRODUCTS = 0.85
"""Share of the peak rate that large matrix products reach."""
MEMORY = 0.9
"""Share of the vendor's memory bandwidth that reading and writing large arrays reaches."""
LINKS = 0.9
"""Share of the vendor's bandwidth that large transfers reach, between devices and to the host."""
ELEMENTWISE = 0.5
"""Share of the vector unit's peak rate that fused elementwise work reaches."""
HOP = 1e-6
"""Seconds that a message takes to the next chip."""

Kind = Literal["products", "elementwise", "memory", "links", "network", "host"]
KINDS: tuple[Kind, ...] = ("products", "elementwise", "memory", "links", "network", "host")
"""Kinds of work; the last three are transfers that nothing hides."""

_CALLING = ("fusion", "async-start", "custom-call", "call")
"""Operations that may hold a collective in a computation that they call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A transfer between devices, or between a device and its host or its on-chip memory.

    Attributes:
      kind: "links", "network", "host" or "memory".
      part: Part of the model that it belongs to; see `parts`.
      collective: The collective; None for a transfer to the host or to on-chip memory.
      asynchronous: Whether other instructions run meanwhile.
      times: Number of runs.
      seconds: Seconds of all runs.
      unhidden: Seconds of all runs in which the program waits for it, and for those before it on
        the same links.
    """

    kind: Kind
    part: str
    collective: Collective | None
    asynchronous: bool
    times: float
    seconds: float
    unhidden: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """Estimated time of one run of a program on each device.

    Attributes:
      seconds: Seconds by kind and part of the model. They add up to the whole.
      transfers: Transfers, hidden or not.
      flops: Operations of products on one device.
      unknown_loops: Names of loops that count once, because their end is not known.
    """

    seconds: Mapping[tuple[Kind, str], float]
    transfers: tuple[Transfer, ...]
    flops: float
    unknown_loops: tuple[str, ...]

    @property
    def total(self) -> float:
        """Seconds of one run."""
        return sum(self.seconds.values(), 0.0)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Collectives with the number of their runs."""
        return tuple(
            dataclasses.replace(one.collective, times=one.times)
            for one in self.transfers
            if one.collective is not None
        )

    def by_kind(self) -> dict[Kind, float]:
        """Returns the seconds by kind."""
        return {
            kind: sum((s for (one, _), s in self.seconds.items() if one == kind), 0.0)
            for kind in KINDS
        }

    def by_part(self) -> dict[str, dict[Kind, float]]:
        """Returns the seconds by part and kind, the longest part first."""
        parts: dict[str, dict[Kind, float]] = {}
        for (kind, part), seconds in self.seconds.items():
            parts.setdefault(part, dict.fromkeys(KINDS, 0.0))[kind] += seconds
        return dict(sorted(parts.items(), key=lambda one: -sum(one[1].values())))

    def hidden(self) -> float:
        """Returns the seconds of transfers between devices or to the host that work hides."""
        found = (one.seconds - one.unhidden for one in self.transfers if one.kind != "memory")
        return sum(found, 0.0)

    def unhidden(self) -> float:
        """Returns the seconds of transfers between devices or to the host that are not hidden."""
        return sum((one.unhidden for one in self.transfers if one.kind != "memory"), 0.0)


def estimate_program(program: Program, *, chip: Chip | None, network: Network) -> Timeline:
    """Estimates the time of a compiled program.

    Args:
      program: Compiled program.
      chip: Peak rates of each device; None counts operations and bytes only.
      network: Links among the devices, in the program's order.
    """
    counts = count_runs(program)
    clock = _Clock(program, counts, chip, network)
    whole = clock.tally(program.computations[program.entry])
    return Timeline(
        seconds=dict(whole.seconds),
        transfers=tuple(whole.transfers),
        flops=whole.flops,
        unknown_loops=counts.unknown,
    )


@dataclasses.dataclass
class _Tally:
    """Time of one run of a computation."""

    seconds: dict[tuple[Kind, str], float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    flops: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values(), 0.0)

    def spend(self, kind: Kind, part: str, seconds: float) -> None:
        if seconds:
            self.seconds[kind, part] += seconds

    def add(self, other: "_Tally", times: float) -> None:
        for (kind, part), seconds in other.seconds.items():
            self.spend(kind, part, seconds * times)
        self.transfers.extend(
            dataclasses.replace(
                one,
                times=one.times * times,
                seconds=one.seconds * times,
                unhidden=one.unhidden * times,
            )
            for one in other.transfers
        )
        self.flops += other.flops * times


@dataclasses.dataclass
class _Flight:
    """An asynchronous transfer under way."""

    kind: Kind
    part: str
    collective: Collective | None
    lanes: frozenset[str]
    seconds: float
    end: float


class _Clock:
    """Goes through a program's computations, each once."""

    def __init__(
        self, program: Program, counts: Counts, chip: Chip | None, network: Network
    ) -> None:
        self.program, self.counts, self.chip, self.network = program, counts, chip, network
        self.known: dict[str, _Tally] = {}

    def tally(self, computation: Computation) -> _Tally:
        """Returns the time of one run of a computation."""
        if computation.name not in self.known:
            self.known[computation.name] = _Run(self, computation).go()
        return self.known[computation.name]

    def product_seconds(self, product: Product) -> float:
        """Returns the seconds of a product, by its shape."""
        if self.chip is None:
            return 0.0
        seconds = self.matrix_seconds(product.computed(self.chip.tile))
        return seconds / self.chip.narrow if product.narrow else seconds

    def matrix_seconds(self, computed: float) -> float:
        """Returns the seconds that the matrix units need for operations in bfloat16."""
        return computed / (self.chip.flops * PRODUCTS) if self.chip else 0.0

    def memory_seconds(self, size: float) -> float:
        """Returns the seconds of reading or writing main memory."""
        return size / (self.chip.memory_bandwidth * MEMORY) if self.chip else 0.0

    def elementwise_seconds(self, work: Traffic) -> float:
        """Returns the seconds of elementwise work: one of four units takes the transcendentals."""
        if self.chip is None:
            return 0.0
        operations = max(work.elementwise, 4.0 * work.transcendental)
        return operations / (self.chip.elementwise * ELEMENTWISE)

    def host_seconds(self, size: float) -> float:
        """Returns the seconds of a transfer to or from the host."""
        return size / (self.chip.host_bandwidth * LINKS) if self.chip else 0.0

    def transfer_seconds(self, one: Collective) -> tuple[float, frozenset[str]]:
        """Returns the seconds of a collective, and the links that it occupies."""
        if self.chip is None:
            return 0.0, frozenset()
        if one.between_slices:
            return one.bytes / (self.chip.network_bandwidth * LINKS), frozenset({"network"})
        rate, network = self.chip.link_bandwidth * LINKS, self.network
        if one.kind == "collective-permute":
            # Only one side of an axis receives.
            busy = network.busiest_link(one.pairs)
            return one.bytes * busy / (rate / 2) + HOP * busy, network.lanes(one.pairs)
        lanes = network.group_lanes(one.members)
        if one.kind == "all-to-all":
            whole = one.bytes * one.group / max(one.group - 1, 1)
            return whole * network.spread(one.members) / (rate / 2) / 2 + HOP, lanes
        rates = network.axis_rates(one.members)
        return one.bytes / (rate * sum(rates)) + HOP * one.group ** (1 / len(rates)), lanes


class _Run:
    """One run of a computation, instruction by instruction."""

    def __init__(self, clock: _Clock, computation: Computation) -> None:
        self.clock, self.computation, self.program = clock, computation, clock.program
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)
        self.flying: dict[str, _Flight] = {}
        self.result = _Tally()
        self.spread = self._spread_collectives()

    def go(self) -> _Tally:
        for one in self.computation.instructions.values():
            self._step(one)
        for name in list(self.flying):
            self._land(name)
        return self.result

    def _step(self, one: Instruction) -> None:
        opcode = one.opcode
        if opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", one.attributes)
            if body is not None:
                trips = self.clock.counts.trips.get(one.name, 1.0)
                self._nest(self.clock.tally(self.program.computations[body[1]]), trips)
        elif opcode == "call":
            for name in one.called():
                self._nest(self.clock.tally(self.program.computations[name]), 1.0)
        elif opcode == "conditional":
            branches = [self.clock.tally(self.program.computations[n]) for n in one.called()]
            # Which branch runs is only known at run time, so the slowest counts.
            slowest = max(branches, key=lambda branch: (branch.total, branch.flops))
            self._nest(slowest, 1.0)
        elif opcode == "async-update":
            # The start only prepares a unit, whose work begins here.
            start = self.computation.instructions[one.operands[0]]
            self._start(start, one.name)
        elif opcode in ("send", "send-done"):
            # The other side's receive counts.
            return
        elif opcode.endswith("-done"):
            self._land(one.operands[0])
        elif opcode.endswith("-start") or opcode == "recv":
            users = self.computation.users.get(one.name, [])
            if not any(user.opcode == "async-update" for user in users):
                self._start(one, one.name)
        elif opcode not in FREE:
            self._work(one)

    def _work(self, one: Instruction) -> None:
        """Runs an instruction that ends before the next begins."""
        part = part_of(self.program, self.computation, one)
        products = list(_products_of(self.program, self.computation, one))
        for product in products:
            self.result.flops += product.flops
        seconds: dict[Kind, float] = {
            "products": sum(map(self.clock.product_seconds, products), 0.0)
        }
        kernel = self._kernel(one)
        work = self._traffic(one) if kernel is None else kernel.traffic
        if kernel is not None:
            self.result.flops += kernel.flops
            seconds["products"] += self.clock.matrix_seconds(kernel.computed)
        seconds["elementwise"] = self.clock.elementwise_seconds(work)
        begin = max(self.free["memory"] - self.now, 0.0) if work.bytes else 0.0
        moved = self.clock.memory_seconds(work.bytes)
        seconds["memory"] = begin + moved if moved else 0.0
        kind = max(seconds, key=lambda name: seconds[name])
        if moved:
            self.free["memory"] = self.now + begin + moved
        found = self._collective(one)
        lasts = seconds[kind]
        if found is not None and one.name not in self.spread:
            taken, lanes = self.clock.transfer_seconds(found)
            wait = max([self.free[lane] - self.now for lane in lanes], default=0.0)
            # A product in the same fusion runs meanwhile.
            hidden = seconds["products"]
            unhidden = max(max(wait, 0.0) + taken - hidden, 0.0)
            for lane in lanes:
                self.free[lane] = self.now + max(wait, 0.0) + taken
            self._record(found, part, taken, unhidden, asynchronous=hidden > 0)
            if not hidden:
                lasts, seconds[kind] = 0.0, 0.0
            self.now += unhidden
        self.now += lasts
        self.result.spend(kind, part, lasts)
        event = self.spread.get(one.name)
        if event is not None:
            channel, starts, ends = event
            if starts and found is not None:
                taken, lanes = self.clock.transfer_seconds(found)
                self._fly(channel, "links", part, found, lanes, taken)
            if ends:
                self._land(channel)

    def _record(
        self,
        one: Collective | None,
        part: str,
        seconds: float,
        unhidden: float,
        *,
        asynchronous: bool,
        kind: Kind | None = None,
    ) -> None:
        if kind is None:
            kind = "network" if one is not None and one.between_slices else "links"
        self.result.transfers.append(
            Transfer(
                kind=kind,
                part=part,
                collective=one,
                asynchronous=asynchronous,
                times=1.0,
                seconds=seconds,
                unhidden=unhidden,
            )
        )
        self.result.spend(kind, part, unhidden)

    def _start(self, one: Instruction, name: str) -> None:
        """Starts an asynchronous operation, which ends with the name's "done"."""
        part = part_of(self.program, self.computation, one)
        found = self._collective(one)
        if found is not None:
            taken, lanes = self.clock.transfer_seconds(found)
            kind: Kind = "network" if found.between_slices else "links"
            self._fly(name, kind, part, found, lanes, taken)
            return
        size = float(min((array.bytes for array in one.result[:2]), default=0))
        arrays = list(one.result)
        if one.opcode == "async-start":
            inner = self.program.computations[one.called()[0]]
            size = sum(
                count_traffic(self.program, inner, step).bytes / 2
                for step in inner.instructions.values()
            )
            arrays += [a for step in inner.instructions.values() for a in step.result]
        if any(array.space == HOST for array in arrays):
            seconds = self.clock.host_seconds(size)
            self._fly(name, "host", part, None, frozenset({"host"}), seconds)
        else:
            seconds = self.clock.memory_seconds(size)
            self._fly(name, "memory", part, None, frozenset({"memory"}), seconds)

    def _fly(
        self,
        name: str,
        kind: Kind,
        part: str,
        collective: Collective | None,
        lanes: frozenset[str],
        seconds: float,
    ) -> None:
        end = max([self.now, *(self.free[lane] for lane in lanes)]) + seconds
        for lane in lanes:
            self.free[lane] = end
        self.flying[name] = _Flight(kind, part, collective, lanes, seconds, end)

    def _land(self, name: str) -> None:
        flight = self.flying.pop(name, None)
        if flight is None:
            return
        unhidden = max(flight.end - self.now, 0.0)
        self.now += unhidden
        self._record(
            flight.collective,
            flight.part,
            flight.seconds,
            unhidden,
            asynchronous=True,
            kind=flight.kind,
        )

    def _nest(self, inner: _Tally, times: float) -> None:
        """Runs another computation here."""
        busy: dict[Kind, float] = defaultdict(float)
        for transfer in inner.transfers:
            busy[transfer.kind] += transfer.seconds * times
        # A transfer under way shares its links with those of the inner computation.
        for flight in self.flying.values():
            if flight.end > self.now:
                flight.end += busy[flight.kind]
        self.now += inner.total * times
        self.result.add(inner, times)

    def _kernel(self, one: Instruction) -> KernelWork | None:
        if one.opcode != "custom-call":
            return None
        operands = [
            array for name in one.operands for array in self.computation.instructions[name].result
        ]
        tile = self.clock.chip.tile if self.clock.chip else 1
        return count_kernel(one, tuple(operands), tile=tile)

    def _traffic(self, one: Instruction) -> Traffic:
        if one.opcode == "custom-call" and '"AllocateBuffer"' in one.attributes:
            return Traffic()
        return count_traffic(self.program, self.computation, one)

    def _collective(self, one: Instruction) -> Collective | None:
        """Returns the collective of an instruction, or of what it calls."""
        scatters = self.computation.name.startswith("all-reduce-scatter")
        return self._find_collective(one, scatters=scatters)

    def _find_collective(self, one: Instruction, *, scatters: bool) -> Collective | None:
        found = read_collective(
            one, scatters=scatters, devices_a_slice=self.clock.network.devices_a_slice
        )
        if found is not None or one.opcode not in _CALLING:
            return found
        for name in one.called():
            scatters = name.startswith("all-reduce-scatter")
            for inner in self.program.computations[name].instructions.values():
                found = self._find_collective(inner, scatters=scatters)
                if found is not None:
                    return found
        return None

    def _spread_collectives(self) -> dict[str, tuple[str, bool, bool]]:
        """Returns the fusions over which a collective is spread: channel, starts it, ends it.

        The compiler may spread a collective over several fusions, to overlap it with them. It
        stands in each of them, with the same channel.
        """
        channels: dict[str, list[str]] = {}
        for one in self.computation.instructions.values():
            if one.opcode == "fusion" and (channel := self._channel(one)) is not None:
                channels.setdefault(channel, []).append(one.name)
        return {
            name: (f"channel {channel}", name == names[0], name == names[-1])
            for channel, names in channels.items()
            if len(names) > 1
            for name in names
        }

    def _channel(self, fusion: Instruction) -> str | None:
        for name in fusion.called():
            if name.startswith("all-reduce-scatter"):
                return None
            for inner in self.program.computations[name].instructions.values():
                if read_collective(inner, devices_a_slice=1) is not None:
                    return inner.attribute("channel_id")
        return None


def _products_of(program: Program, computation: Computation, one: Instruction) -> Iterator[Product]:
    if one.opcode == "fusion":
        inner = program.computations[one.called()[0]]
        for step in inner.instructions.values():
            yield from _products_of(program, inner, step)
        return
    factors = [computation.instructions[name].result for name in one.operands[:2]]
    arrays = [arrays[0] if arrays else None for arrays in factors]
    if len(arrays) == 2 and (product := read_product(one, arrays[0], arrays[1])) is not None:
        yield product
