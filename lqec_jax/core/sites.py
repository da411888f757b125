"""Where the linears of a block live in its tree: the one owner of their addresses.

    block = {'attn': {'q': {'kernel': w, 'bias': ...}, ...}, 'mlp': {...}, 'attn_norm': {...}}

A linear is named by its path, 'attn/q'; its weight, an array or a CompressedLinear, lies at the
address 'attn/q/kernel'. Whoever wants one asks here, by a `Site` or by its path, and spells no
address. `block` is one block's tree, a stack of them, or a tree of the same form of something else.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lqec_jax.core.tree import Params, get_at, is_compressed, set_at

KERNEL = "kernel"


@dataclass(frozen=True)
class Site:
    """One linear of a block: where it lives, and what is known of it before any array is read.

    Attributes:
      path: its module, 'attn/q'.
      d_in, d_out: its widths; None where whoever made the site left them to the arrays.
      biased: whether a bias lies beside the weight.
      group: number of its data-flow group; linears of one group read the same input.
      split: the axis that is cut over devices, 'out' (column parallel) or 'in' (row parallel).
      experts: how many weights of that shape lie on a leading axis; 0 where there is one, without.
    """

    path: str
    d_in: int | None = None
    d_out: int | None = None
    biased: bool = False
    group: int = 0
    split: Literal["in", "out"] = "out"
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the weight's shape, [d_in, d_out], after the experts where there are some."""
        return (self.experts, self.d_in, self.d_out) if self.experts else (self.d_in, self.d_out)


def in_groups(
    groups: Iterable[Iterable[str]], row_parallel: Iterable[str] = ()
) -> tuple[Site, ...]:
    """Returns the sites of a model of one's own, whose arrays tell the widths.

    Args:
      groups: paths of a block's linears in data-flow order, those that share an input together.
      row_parallel: the paths whose input, not output, is split over devices.
    Example:
      >>> [site.group for site in in_groups([("q", "k"), ("o",)])]
      [0, 0, 1]
    """
    split_in = frozenset(row_parallel)
    return tuple(
        Site(path, group=number, split="in" if path in split_in else "out")
        for number, paths in enumerate(groups)
        for path in paths
    )


def kernel_path(site: Site | str) -> str:
    """Returns the address of a linear's weight: 'attn/q' -> 'attn/q/kernel'."""
    return f"{_path(site)}/{KERNEL}"


def linear_path(address: str) -> str | None:
    """Returns the linear whose weight lies at an address; None where no weight of one does.

    Example:
      >>> linear_path("attn/q/kernel"), linear_path("attn/q/bias")
      ('attn/q', None)
    """
    path, _, last = address.rpartition("/")
    return path if path and last == KERNEL else None


def get(block: Params, site: Site | str) -> Any:
    """Returns a linear's weight.

    Raises: KeyError: the block has no such linear.
    """
    return get_at(block, kernel_path(site))


def put(block: Params, site: Site | str, leaf: Any) -> Params:
    """Returns a copy of the block with another weight for one linear; the rest is shared."""
    return set_at(block, kernel_path(site), leaf)


def get_all(block: Params, sites: Iterable[Site | str]) -> dict[str, Any]:
    """Returns path -> weight, in the order of the sites."""
    return {_path(site): get(block, site) for site in sites}


def put_all(block: Params, leaves: Mapping[str, Any]) -> Params:
    """Undoes `get_all`: returns a copy of the block with weights by path put in."""
    for path, leaf in leaves.items():
        block = put(block, path, leaf)
    return block


def map_block(block: Params, sites: Iterable[Site | str], change: Callable[[Any], Any]) -> Params:
    """Returns a copy of the block with `change(weight)` in place of each weight."""
    return put_all(block, {path: change(w) for path, w in get_all(block, sites).items()})


def map_model(
    params: Params, sites: Iterable[Site | str], change: Callable[[Any, int], Any]
) -> Params:
    """Returns the model with `change(leaf, number)` in place of each stacked compressed weight.

    Numbers count linears, segment after segment, those that are not compressed too: random keys are
    folded from them.
    """
    sites, number, segments = tuple(sites), 0, []
    for segment in params["blocks"]:
        for site in sites:
            leaf = get(segment, site)
            if is_compressed(leaf):
                segment = put(segment, site, change(leaf, number))
            number += 1
        segments.append(segment)
    return {**params, "blocks": tuple(segments)}


def each(params: Params, sites: Iterable[Site | str]) -> Iterator[tuple[str, Any]]:
    """Yields (path, stacked weight) of every linear, segment after segment."""
    sites = tuple(sites)
    for segment in params["blocks"]:
        yield from get_all(segment, sites).items()


def _path(site: Site | str) -> str:
    return site if isinstance(site, str) else site.path
