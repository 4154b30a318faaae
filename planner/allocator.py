"""PyTorch's CUDA caching allocator, replayed: what a list of allocations and frees reserves on the GPU.

`torch.cuda.memory_allocated` counts blocks and `memory_reserved` counts segments, so neither follows from the sizes
of tensors alone. This module applies the rules of torch 2.11's c10/cuda/CUDACachingAllocator.cpp to the events of a
step (paper.py); the comments name the function that each rule comes from. They hold for the settings that PyTorch
starts with (no max_split_size, roundup_power2_divisions or garbage_collection_threshold), with expandable_segments off
or on. A freed block is free at once on its stream (nothing calls record_stream), so active bytes are allocated bytes.

Blocks are ranges of addresses, counted in units of 512 bytes because every size and address is a multiple of that.
A range is one integer, `size << 48 | start`: sorted, such integers stand in the order in which best fit looks at
free blocks (BlockComparatorSize: by size, then by address). Free ranges are found by where they start and by where
they end as well, which is all that merging neighbours needs. Two segments never touch, so they never merge.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_UNIT = 512  # kMinBlockSize
_SHIFT = 48
_ADDRESS = (1 << _SHIFT) - 1
_MIB = (1 << 20) // _UNIT
_SMALL = _MIB  # kSmallSize: requests up to this go to the small pool
_SMALL_SEGMENT = 2 * _MIB  # kSmallBuffer
_LARGE_SEGMENT = 20 * _MIB  # kLargeBuffer
_OWN_SEGMENT = 10 * _MIB  # kMinLargeAlloc: requests from here on get a segment of their own size, ...
_ROUND_LARGE = 2 * _MIB  # kRoundLarge: ... rounded up to this
_RESERVATION = 32 * _MIB
_TOP = 1 << 45  # the end of the first segment's reservation
_GAP_ABOVE = (512 - 96) * _MIB
_UNLIMITED = (64 << 40) // _UNIT  # 64 TiB: more than any machine holds, and its addresses still fit
# One range of virtual addresses for each pool, as expandable_segments has it; longer than any GPU's memory.
_SMALL_RANGE = (_SMALL_SEGMENT, 1 << 46)
_LARGE_RANGE = (_LARGE_SEGMENT << 31, 1 << 47)


def block_bytes(nbytes: int) -> int:
    """What a request of `nbytes` takes up in a block of its own: rounded up to 512 bytes (round_size)."""
    return -(-nbytes // _UNIT) * _UNIT


def change(events: Iterable[int], sizes: Sequence[int]) -> tuple[int, int]:
    """What `events` add in bytes of blocks, and the most that they add on the way, wherever the blocks are placed."""
    running = [0]
    running += accumulate([(-sizes[e >> 1] // _UNIT if e & 1 else -(-sizes[e >> 1] // _UNIT)) * _UNIT for e in events])
    return running[-1], max(running)


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The allocation that found no room, even after every cached segment had gone back to the GPU."""

    event: int  # position in the list of events
    requested_bytes: int
    segment_bytes: int  # what was asked of the GPU: PyTorch's "Tried to allocate"
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The counters after one list of events, and their peaks within it.

    `peak_*_event` is the position of the event that first reached the peak; -1 where nothing exceeded the start.
    """

    allocated_bytes: int
    reserved_bytes: int
    requested_bytes: int
    peak_allocated_bytes: int
    peak_allocated_event: int
    peak_reserved_bytes: int
    peak_reserved_event: int
    peak_requested_bytes: int
    peak_requested_event: int
    retries: int  # how often the cache was given back to make room (num_alloc_retries): each one stalls the GPU
    out_of_memory: OutOfMemory | None = None


def replay(
    events: Iterable[int],
    sizes: Sequence[int] | Mapping[int, int],
    *,
    expandable_segments: bool = False,
    limit_bytes: int | None = None,
) -> Replay:
    """Plays one list of events on an empty allocator; see `Allocator.replay`."""
    return Allocator(expandable_segments=expandable_segments, limit_bytes=limit_bytes).replay(events, sizes)


class _Addresses:
    """Where cudaMalloc puts segments: of two free blocks of one size best fit takes the lower, so it matters.

    The driver reserves addresses by multiples of 32 MiB. It first uses what is left of those that it has, lowest
    address first; then it reserves at the top of the highest gap that has room, as Linux' mmap does, and a reservation
    in which nothing is left becomes a gap. While it makes the first segment of a process, it holds 512 MiB above it
    that it lets go of soon after, and of which it then takes 96 MiB for itself: later segments fill that gap. So it was
    in fresh processes on an H200 (driver 580, CUDA 13.0). What else the driver puts between segments for itself
    (kernels, workspaces) is not played.
    """

    __slots__ = ("_fresh", "_gaps", "_reserved", "_rooms", "_starts")

    def __init__(self) -> None:
        self._reserved: dict[int, int] = {}  # start -> end
        self._starts: list[int] = []  # of the same, sorted
        self._rooms: list[tuple[int, int]] = []  # start and end of what is unused in them, sorted
        self._gaps: list[tuple[int, int]] = [(0, _TOP)]  # start and end of what is not reserved, sorted
        self._fresh = True

    def take(self, length: int) -> int:
        """The address of a new segment. Addresses are doubled, so that two segments never touch, and never merge."""
        for i, (start, end) in enumerate(self._rooms):
            if end - start >= length:
                if end - start > length:
                    self._rooms[i] = (start + length, end)
                else:
                    del self._rooms[i]
                return 2 * start
        needed = -(-length // _RESERVATION) * _RESERVATION
        i = next(i for i in reversed(range(len(self._gaps))) if self._gaps[i][1] - self._gaps[i][0] >= needed)
        low, end = self._gaps[i]
        start = end - needed
        self._gaps[i] = (low, start)
        if self._fresh:
            self._gaps.append((_TOP, _TOP + _GAP_ABOVE))
            self._fresh = False
        self._reserved[start] = end
        insort(self._starts, start)
        if start + length < end:
            insort(self._rooms, (start + length, end))
        return 2 * start

    def give_back(self, address: int, length: int) -> None:
        """Frees a segment; a reservation that holds none goes."""
        start, end = address // 2, address // 2 + length
        reservation = self._starts[bisect_right(self._starts, start) - 1]
        limit = self._reserved[reservation]
        room = _joined(self._rooms, start, end, reservation, limit)
        if room == (reservation, limit):
            self._starts.remove(reservation)
            del self._reserved[reservation]
            insort(self._gaps, _joined(self._gaps, reservation, limit, 0, _TOP + _GAP_ABOVE))
        else:
            insort(self._rooms, room)


def _joined(ranges: list[tuple[int, int]], start: int, end: int, least: int, most: int) -> tuple[int, int]:
    """A range with those of `ranges` that touch it, which are removed there; none reaches beyond `least` and `most`."""
    i = bisect_left(ranges, (start, end))
    if i < len(ranges) and ranges[i][0] == end < most:
        end = ranges.pop(i)[1]
    if i > 0 and ranges[i - 1][1] == start > least:
        start = ranges.pop(i - 1)[0]
    return start, end


class Allocator:
    """One GPU's caching allocator: blocks live on from one list of events to the next.

    `limit_bytes` is what the GPU has for segments: its memory less CUDA's context and other processes. A fraction
    set by torch.cuda.set_per_process_memory_fraction is such a limit too, but with expandable_segments PyTorch counts
    the whole of a request against it and not only the pages that it lacks, so it may fail a little sooner.
    """

    __slots__ = (
        "_addresses", "_allocated", "_at", "_by_end", "_by_start", "_handles", "_held", "_holes", "_large",
        "_last_handle", "_limit", "_others", "_peak_allocated", "_peak_requested", "_peak_reserved",
        "_peak_reserved_event", "_requested", "_reserved", "_retries", "_segments", "_small", "_unmapped",
        "_unmapped_by_end", "expandable_segments",
    )  # fmt: skip

    def __init__(self, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> None:
        self.expandable_segments = expandable_segments
        self._limit = _UNLIMITED if limit_bytes is None else min(limit_bytes // _UNIT, _UNLIMITED)
        self._small: list[int] = []  # the free blocks of each pool, sorted
        self._large: list[int] = []
        self._by_start: dict[int, int] = {}  # the same by where they start
        self._by_end: dict[int, int] = {}  # and by where they end
        # What is allocated, by the id of its allocation: the block, where it starts, its size, the bytes asked for.
        self._held: dict[int, tuple[int, int, int, int]] = {}
        self._handles: dict[int, int] = {}  # requested bytes of what `alloc` gave out
        self._last_handle = 0
        self._segments: dict[int, int] = {}  # start -> size; without expandable_segments
        self._addresses = _Addresses()
        self._others: tuple[Allocator, ...] = ()  # of the same GPU, for its other streams
        self._unmapped: dict[int, int] = {}  # start -> end of addresses without memory; with expandable_segments
        self._unmapped_by_end: dict[int, int] = {}
        self._holes: tuple[list[int], list[int]] = ([], [])  # their starts in the small and the large pool, sorted
        self._allocated = self._reserved = self._requested = self._retries = 0
        if expandable_segments:
            for holes, (start, end) in zip(self._holes, (_SMALL_RANGE, _LARGE_RANGE), strict=True):
                self._leave_hole(holes, start, end)
        self.reset_peaks()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of allocated blocks (torch.cuda.memory_allocated)."""
        return self._allocated * _UNIT

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken from the GPU (torch.cuda.memory_reserved)."""
        return self._reserved * _UNIT

    @property
    def requested_bytes(self) -> int:
        """Bytes asked for, before any rounding (memory_stats' requested_bytes)."""
        return self._requested

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest `allocated_bytes` since `reset_peaks`."""
        return self._peak_allocated * _UNIT

    @property
    def peak_reserved_bytes(self) -> int:
        """Highest `reserved_bytes` since `reset_peaks`; of several streams, those of all."""
        return self._peak_reserved * _UNIT

    @property
    def peak_requested_bytes(self) -> int:
        """Highest `requested_bytes` since `reset_peaks`."""
        return self._peak_requested

    @property
    def held(self) -> set[int]:
        """The ids of what is allocated; an allocation of no bytes is none."""
        return set(self._held)

    @property
    def retries(self) -> int:
        """How often the cache was given back to make room (memory_stats' num_alloc_retries)."""
        return self._retries

    def reset_peaks(self) -> None:
        """Peaks start again from what is there now (torch.cuda.reset_peak_memory_stats)."""
        self._peak_allocated = self._allocated
        self._peak_requested = self._requested
        self._peak_reserved = self._reserved_by_all
        self._at = self._peak_reserved_event = -1

    def empty_cache(self) -> None:
        """Gives every unused segment back to the GPU (torch.cuda.empty_cache).

        release_cached_blocks: first the large pool, then the small one (release_blocks).
        """
        for pool in (self._large, self._small):
            for block in pool.copy():
                start, length = block & _ADDRESS, block >> _SHIFT
                if self.expandable_segments:
                    self._unmap(pool, start, start + length)
                elif self._segments.get(start) == length:  # only what is not split
                    del self._segments[start]
                    self._addresses.give_back(start, length)
                    self._take(pool, start, start + length)
                    self._reserved -= length

    def alloc(self, nbytes: int) -> int | None:
        """One allocation: a handle for `free`, or None where the limit leaves no room."""
        self._last_handle -= 1  # below every id of a list of events
        handle = self._last_handle
        if self._run((2 * handle,), {handle: nbytes})[-1]:
            return None
        self._handles[handle] = nbytes
        return handle

    def free(self, handle: int) -> None:
        """Frees what `alloc` gave out; KeyError for anything else."""
        self._run((2 * handle + 1,), {handle: self._handles.pop(handle)})

    def replay(self, events: Iterable[int], sizes: Sequence[int] | Mapping[int, int]) -> Replay:
        """Plays `events` (2 * id allocates sizes[id] bytes, 2 * id + 1 frees them) and stops where memory runs out.

        Peaks are those of this list alone. What an earlier list left is still there and may be freed by its id; an
        id may be used again once it is free. Raises ValueError where an event allocates what is allocated already
        or frees what is not.
        """
        self.reset_peaks()
        retries = self.retries
        allocated_event, requested_event, failed = self._run(events, sizes)
        return Replay(
            self.allocated_bytes,
            self.reserved_bytes,
            self.requested_bytes,
            self.peak_allocated_bytes,
            allocated_event,
            self.peak_reserved_bytes,
            self._peak_reserved_event,
            self.peak_requested_bytes,
            requested_event,
            self.retries - retries,
            failed,
        )

    def _run(
        self, events: Iterable[int], sizes: Sequence[int] | Mapping[int, int]
    ) -> tuple[int, int, OutOfMemory | None]:
        """The events one by one: where allocated and requested bytes peaked, and what did not fit.

        This loop decides how fast a plan is: it keeps to local names, calls nothing of its own but for a new segment,
        and takes ranges apart and puts them together by adding and subtracting: what is cut off the front of `block`
        is `size` units, so the rest is `block - (size << 48) + size`.
        """
        small, large, by_start, by_end, held = self._small, self._large, self._by_start, self._by_end, self._held
        unmapped, small_size, bisect = self._unmapped, _SMALL, bisect_left
        allocated, peak_allocated, allocated_event = self._allocated, self._peak_allocated, -1
        requested, peak_requested, requested_event = self._requested, self._peak_requested, -1
        # should_split: a block is cut where at least 512 bytes would be left of it, but without expandable_segments
        # one of the large pool only where more than 1 MiB would.
        least_of_large = 1 if self.expandable_segments else _SMALL + 1
        failed = None
        for at, event in enumerate(events):
            name = event >> 1
            if event & 1:  # free_block
                if name not in held:
                    if sizes[name]:
                        raise ValueError(f"event {at} frees {name}, which is not allocated")
                    continue
                block, start, size, nbytes = held.pop(name)
                end = start + size
                allocated -= size
                requested -= nbytes
                # An allocated block is never longer than 1 MiB in the small pool and always is in the large one.
                pool = small if size <= small_size else large
                if start in by_end:  # try_merge_blocks
                    before = by_end.pop(start)
                    del pool[bisect(pool, before)]
                    block += before - start
                    start = before & _ADDRESS
                if end in by_start:
                    after = by_start.pop(end)
                    del pool[bisect(pool, after)]
                    block += after - end
                    end += after >> _SHIFT
                by_start[start] = by_end[end] = block
                insort(pool, block)
                continue
            nbytes = sizes[name]
            size = (nbytes + (_UNIT - 1)) // _UNIT  # round_size
            if size <= small_size:  # get_pool
                if nbytes <= 0:
                    if nbytes < 0:
                        raise ValueError(f"event {at} allocates {nbytes} bytes")
                    continue  # NativeCachingAllocator::allocate asks for nothing then
                pool, least = small, 1
            else:
                pool, least = large, least_of_large
            wanted = size << _SHIFT
            place = bisect(pool, wanted)  # get_free_block: best fit
            if place == len(pool):
                self._at = at
                place = self._grow(pool, size)
                if place < 0:
                    failed = OutOfMemory(
                        at, nbytes, _segment_size(size) * _UNIT, allocated * _UNIT, self._reserved * _UNIT
                    )
                    break
            if name in held:
                raise ValueError(f"event {at} allocates {name}, which is allocated already")
            block = pool[place]
            start, length = block & _ADDRESS, block >> _SHIFT
            end = start + length
            if end in unmapped:
                place = self._prefer_inner(pool, place)
                block = pool[place]
                start, length = block & _ADDRESS, block >> _SHIFT
                end = start + length
            del by_start[start]
            if length - size >= least:  # alloc_found_block: the request takes the front, the rest stays free
                rest = block - wanted + size
                by_start[start + size] = by_end[end] = rest
                if place and pool[place - 1] > rest:
                    del pool[place]
                    insort(pool, rest, 0, place)
                else:  # mostly the rest is still larger than the block before it
                    pool[place] = rest
                block = wanted + start
            else:
                del pool[place], by_end[end]
                size = length
            held[name] = block, start, size, nbytes
            allocated += size
            if allocated > peak_allocated:
                peak_allocated, allocated_event = allocated, at
            requested += nbytes
            if requested > peak_requested:
                peak_requested, requested_event = requested, at
        self._allocated, self._peak_allocated = allocated, peak_allocated
        self._requested, self._peak_requested = requested, peak_requested
        return allocated_event, requested_event, failed

    def _grow(self, pool: list[int], size: int) -> int:
        """A free block of at least `size` on memory new from the GPU: its place in the pool, or -1.

        malloc: try, give the whole cache back, try again.
        """
        take = self._map if self.expandable_segments else self._new_segment
        block = take(pool, size)
        if not block:
            self._retries += 1
            for each in (self, *self._others):
                each.empty_cache()
            block = take(pool, size)
        return bisect_left(pool, block) if block else -1

    def _new_segment(self, pool: list[int], size: int) -> int:
        """alloc_block: a segment with one free block in it; 0 where the GPU has no room."""
        length = _segment_size(size)
        if self._reserved_by_all + length > self._limit:
            return 0
        start = self._addresses.take(length)
        self._segments[start] = length
        self._reserve(length)
        return self._put(pool, start, start + length)

    @property
    def _reserved_by_all(self) -> int:
        return self._reserved + sum([other._reserved for other in self._others])

    def _reserve(self, length: int) -> None:
        self._reserved += length
        reserved = self._reserved_by_all
        if reserved > self._peak_reserved:
            self._peak_reserved, self._peak_reserved_event = reserved, self._at

    def _put(self, pool: list[int], start: int, end: int) -> int:
        """Adds a free block without looking at its neighbours."""
        self._by_start[start] = self._by_end[end] = block = (end - start) << _SHIFT | start
        insort(pool, block)
        return block

    def _take(self, pool: list[int], start: int, end: int) -> None:
        """Removes a free block."""
        del pool[bisect_left(pool, self._by_start.pop(start))]
        del self._by_end[end]

    # With expandable_segments each pool has one range of addresses, into which memory is mapped by the page. What has
    # no memory is a hole; the last hole has no end that a GPU could reach.

    def _prefer_inner(self, pool: list[int], place: int) -> int:
        """get_free_block: a block before a hole could grow, so it counts as that much longer."""
        while place + 1 < len(pool) and self._room(pool[place + 1]) < self._room(pool[place]):
            place += 1
        return place

    def _room(self, block: int) -> int:
        size = block >> _SHIFT
        end = (block & _ADDRESS) + size
        return size + self._unmapped.get(end, end) - end

    def _map(self, pool: list[int], size: int) -> int:
        """try_allocate_expandable_block: fills the lowest hole that has room, together with the free memory around it.

        0 where the GPU has no room; what was mapped before that stays, as in PyTorch.
        """
        page, holes = self._paging(pool)
        for hole in holes:
            start = self._by_end.get(hole, hole) & _ADDRESS
            if self._reach(hole) - start >= size:
                break
        else:
            return 0
        while True:
            # map_block: whole pages, and no more than the hole has.
            end = self._unmapped[hole]
            mapped = min(hole - (hole - start - size) // page * page, end)
            if self._reserved_by_all + mapped - hole > self._limit:
                return 0
            self._fill_hole(holes, hole, end)
            if mapped < end:
                self._leave_hole(holes, mapped, end)
            self._reserve(mapped - hole)
            if start < hole:
                self._take(pool, start, hole)
            if after := self._by_start.get(mapped, 0) >> _SHIFT:
                self._take(pool, mapped, mapped + after)
                mapped += after
            block = self._put(pool, start, mapped)
            if mapped - start >= size:
                return block
            hole = mapped

    def _reach(self, address: int) -> int:
        """find_expandable_block: the end of the free and unmapped addresses from `address` on."""
        while True:
            if end := self._unmapped.get(address, 0):
                address = end
            elif free := self._by_start.get(address, 0):
                address += free >> _SHIFT
            else:
                return address

    def _unmap(self, pool: list[int], start: int, end: int) -> None:
        """unmap_block: the whole pages in a free block go back to the GPU."""
        page, holes = self._paging(pool)
        first, last = -(-start // page) * page, end // page * page
        if first >= last:
            return
        self._take(pool, start, end)
        if start < first:
            self._put(pool, start, first)
        if last < end:
            self._put(pool, last, end)
        self._reserved -= last - first
        if first in self._unmapped_by_end:
            before = self._unmapped_by_end[first]
            self._fill_hole(holes, before, first)
            first = before
        if last in self._unmapped:
            after = self._unmapped[last]
            self._fill_hole(holes, last, after)
            last = after
        self._leave_hole(holes, first, last)

    def _paging(self, pool: list[int]) -> tuple[int, list[int]]:
        """The page size and the holes of a pool."""
        return (_SMALL_SEGMENT, self._holes[0]) if pool is self._small else (_LARGE_SEGMENT, self._holes[1])

    def _leave_hole(self, holes: list[int], start: int, end: int) -> None:
        self._unmapped[start] = end
        self._unmapped_by_end[end] = start
        insort(holes, start)

    def _fill_hole(self, holes: list[int], start: int, end: int) -> None:
        del self._unmapped[start], self._unmapped_by_end[end]
        holes.remove(start)


class Streams:
    """One GPU's caching allocator where tensors belong to several CUDA streams: `streams` gives the stream of an id.

    What is free on one stream is never given to another (get_free_block), so each stream has blocks of its own, and all
    take segments from the same addresses and the same memory. Ids that `streams` lacks are of stream 0; it may grow.
    """

    def __init__(
        self,
        streams: Mapping[int, int],
        count: int,
        *,
        expandable_segments: bool = False,
        limit_bytes: int | None = None,
    ) -> None:
        self._streams = streams
        self._each = [Allocator(expandable_segments=expandable_segments, limit_bytes=limit_bytes) for _ in range(count)]
        for one in self._each:
            one._addresses = self._each[0]._addresses
            one._others = tuple(other for other in self._each if other is not one)

    @property
    def held(self) -> set[int]:
        """The ids of what is allocated."""
        return set().union(*(each.held for each in self._each))

    @property
    def retries(self) -> int:
        """How often the cache was given back to make room."""
        return sum(each.retries for each in self._each)

    def empty_cache(self) -> None:
        """Gives every unused segment back to the GPU."""
        for each in self._each:
            each.empty_cache()

    def replay(self, events: Sequence[int], sizes: Sequence[int] | Mapping[int, int]) -> Replay:
        """As `Allocator.replay`: each run of events of one stream on its blocks, with peaks beside the rest."""
        of = self._streams
        stream_of = [of.get(e >> 1, 0) for e in events]
        changes = [i for i in range(1, len(events)) if stream_of[i] != stream_of[i - 1]]
        started, retries = self._sums(), self.retries
        peaks, at = list(started), [-1, -1, -1]
        failed = None
        for start, end in zip([0, *changes], [*changes, len(events)], strict=True):
            one = self._each[stream_of[start] if events else 0]
            rest = [total - own for total, own in zip(self._sums(), _sums_of(one), strict=True)]
            rest[1] = 0  # the peak of what is reserved is that of all streams
            result = one.replay(events[start:end], sizes)
            found = (
                (result.peak_allocated_bytes, result.peak_allocated_event),
                (result.peak_reserved_bytes, result.peak_reserved_event),
                (result.peak_requested_bytes, result.peak_requested_event),
            )
            for i, (peak, event) in enumerate(found):
                if rest[i] + peak > peaks[i]:
                    peaks[i], at[i] = rest[i] + peak, start + event
            if result.out_of_memory is not None:
                allocated, reserved, _ = self._sums()
                failed = replace(
                    result.out_of_memory, event=start + result.out_of_memory.event, allocated_bytes=allocated,
                    reserved_bytes=reserved,
                )  # fmt: skip
                break
        allocated, reserved, requested = self._sums()
        return Replay(
            allocated,
            reserved,
            requested,
            peaks[0],
            at[0],
            peaks[1],
            at[1],
            peaks[2],
            at[2],
            self.retries - retries,
            failed,
        )

    def _sums(self) -> list[int]:
        return [sum(each) for each in zip(*(_sums_of(one) for one in self._each), strict=True)]


def _sums_of(one: Allocator) -> tuple[int, int, int]:
    return one.allocated_bytes, one.reserved_bytes, one.requested_bytes


def _segment_size(size: int) -> int:
    """get_allocation_size, in units."""
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _ROUND_LARGE) * _ROUND_LARGE
