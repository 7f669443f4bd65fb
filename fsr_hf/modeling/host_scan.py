"""
Speed only: Scan on the CPU. It chooses the anchors that the step-by-step loop chooses, several at a time, by matrix
products.

A token's maximum cosine to the chosen set only grows, so a stale value is a lower bound. The tokens with the lowest
values are the candidates of a round. All cosines among them are computed, and anchors are chosen from them as long as
the next one is farther than any other token can be. Then one matrix product updates all tokens. So nearly all the work
is the cosines between anchors and tokens, which Refine needs anyway, and memory grows linearly with the number of
tokens.
"""

import torch


__all__ = ["can_scan_on_host", "scan_on_host"]

_SMALL = 256  # up to this many tokens, the step-by-step loop is as fast
_MEDIUM = 1024  # up to this many tokens, a round with few anchors makes all tokens candidates
_TILE, _ROW_TILE = 64, 16  # columns and rows of a matrix product that every library rounds alike
_MAX_PART = 1024  # columns of one matrix product, if the number of tokens is no multiple of `_TILE`
_MIN_CANDIDATES, _MAX_CANDIDATES = 128, 512


def can_scan_on_host(features: torch.Tensor) -> bool:
    """Whether [`scan_on_host`] may scan `features`: it reads values, so not while code is being traced."""
    return features.device.type == "cpu" and features.shape[1] > _SMALL and not torch.compiler.is_compiling()


def scan_on_host(
    features: torch.Tensor, mask: torch.Tensor, focus: torch.Tensor, even: torch.Tensor, num_anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Eqs. 5 and 8 on the CPU.

    Args:
        features (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The tokens.
        mask (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            True for real tokens.
        focus (`torch.LongTensor` of shape `(batch, width)`):
            The Focus tokens, filled up with `num_tokens`; at least one in a row that gets anchors.
        even (`torch.LongTensor` of shape `(batch, width - 1)`):
            The anchors to begin with, ascending, filled up with `num_tokens`.
        num_anchors (`torch.LongTensor` of shape `(batch,)`):
            How many anchors there will be, no more than there are tokens left.

    Returns:
        The anchors in the order of their choice, `(batch, width - 1)`, filled up with `num_tokens`; the anchor that is
        most similar to each token, `(batch, num_tokens)`; and its cosine, -inf if there is none or the token is not
        finite.
    """
    batch, num_tokens, _ = features.shape
    anchors = focus.new_full((batch, focus.shape[1] - 1), num_tokens)
    nearest = focus.new_full((batch, num_tokens), -1)
    similarity = torch.full((batch, num_tokens), -torch.inf)
    for row, count in enumerate(num_anchors.tolist()):
        if count > 0:
            scan = _RowScan(features[row], mask[row], focus[row][focus[row] < num_tokens])
            given = even[row][even[row] < num_tokens]
            scan.add(given)
            anchors[row, :count] = torch.cat([given, scan.choose(count - len(given))])
            nearest[row], similarity[row] = scan.nearest, scan.similarity.masked_fill_(~scan.is_finite, -torch.inf)
    return anchors, nearest, similarity


class _RowScan:
    """
    The state of Scan in one row.

    Args:
        features (`torch.FloatTensor` of shape `(num_tokens, hidden_size)`):
            The tokens.
        mask (`torch.BoolTensor` of shape `(num_tokens,)`):
            True for real tokens.
        focus (`torch.LongTensor` of shape `(num_focus,)`):
            The Focus tokens.
    """

    def __init__(self, features, mask, focus):
        self.num_tokens, self.hidden_size = features.shape
        self.tokens = features.float().contiguous()
        norm = torch.linalg.vector_norm(self.tokens, dim=-1)
        if not ((norm > 2.0**-40) & (norm < 2.0**40)).all():  # squares may be out of range; zero vectors; NaN
            peak = torch.maximum(self.tokens.amax(-1), -self.tokens.amin(-1))
            self.tokens = self.tokens / peak.masked_fill(peak == 0, 1.0)[:, None]
            norm = torch.linalg.vector_norm(self.tokens, dim=-1)
            norm.masked_fill_(norm == 0, 1.0)
        self.is_finite = norm.isfinite()
        self.is_all_finite = bool(self.is_finite.all())
        self.scale = norm.reciprocal_()
        self.parts = _split(self.tokens)
        self.pairs = None  # cosines of all pairs, once they are needed

        self.nearest = torch.full((self.num_tokens,), -1)
        self.similarity = torch.full((self.num_tokens,), -torch.inf)
        # Cosine of each token to the closest one chosen so far; infinity takes a token out of the choice.
        self.closest = torch.full((self.num_tokens,), -1.0)
        for block in focus.split(_MAX_CANDIDATES):
            self.closest = torch.maximum(self.closest, self._to_all(block).amax(0))
        self.closest.masked_fill_(~mask, torch.inf)[focus] = torch.inf

    def _to_all(self, chosen: torch.Tensor) -> torch.Tensor:
        """Cosines of the tokens `chosen` to all, `(chosen, num_tokens)`."""
        if self.pairs is not None:
            return self.pairs[chosen]
        return self._to_parts(_pad(self.tokens.index_select(0, chosen), _ROW_TILE), self.scale[chosen])

    def _among(self, candidates: torch.Tensor) -> torch.Tensor:
        """Cosines of the tokens `candidates`, ascending, to each other, `(candidates, candidates)`."""
        if len(candidates) < self.num_tokens:
            tokens = _pad(self.tokens.index_select(0, candidates), _TILE)
            return self._scaled(tokens @ tokens.mT, self.scale[candidates], self.scale[candidates])
        if self.pairs is None:
            scales = self.scale.split(len(self.parts[0]))
            self.pairs = _join([self._to_parts(*rows) for rows in zip(self.parts, scales)], dim=0)
        return self.pairs

    def _to_parts(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Cosines of `rows`, which may end with padding, to all tokens."""
        return self._scaled(_join([rows @ part.mT for part in self.parts], dim=1), scale, self.scale)

    def _scaled(self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Cosines from products, without the padding. `rows` and `columns` are the reciprocal norms of both sides."""
        cosines = products[: len(rows), : len(columns)].mul_(columns).mul_(rows[:, None]).clamp_(-1.0, 1.0)
        return cosines if self.is_all_finite else cosines.nan_to_num_(nan=-1.0)

    def choose(self, count: int) -> torch.Tensor:
        """The next `count` anchors in the order of their choice."""
        anchors: list[torch.Tensor] = []
        size, cosines_computed = min(_MIN_CANDIDATES, self.num_tokens), 0
        while count > 0:
            # All pairs take at most twice the memory of the features, and no round is needed after them.
            if 2 * cosines_computed > self.num_tokens**2 and self.num_tokens <= 2 * self.hidden_size:
                size = self.num_tokens
            order = self.closest.sort(stable=True)
            candidates = order.indices[:size].sort().values  # ascending: the first of equal ones has the lowest index
            bound = (float(order.values[size]), int(order.indices[size])) if size < self.num_tokens else (torch.inf, 0)
            pairs = self._among(candidates)
            max_anchors = count if size == self.num_tokens else min(count, size // 2)
            places = _farthest_first(self.closest[candidates], pairs, candidates.tolist(), bound, max_anchors)
            chosen = candidates[places]
            anchors.append(chosen)
            self.add(chosen.sort().values)
            count -= len(chosen)
            cosines_computed += size**2 + len(chosen) * self.num_tokens
            if len(chosen) < size // 16 and self.num_tokens <= _MEDIUM:
                size = self.num_tokens
            elif len(chosen) < size // 4:
                size = min(2 * size, max(_MAX_CANDIDATES, size), self.num_tokens)
        return torch.cat(anchors or [self.nearest[:0]])

    def add(self, chosen: torch.Tensor) -> None:
        """Update all tokens for the new anchors `chosen`, ascending."""
        for block in chosen.split(_MAX_CANDIDATES) if len(chosen) else ():
            cosines = self._to_all(block)
            self.closest = torch.maximum(self.closest, cosines.amax(0))
            if not self.is_all_finite:
                cosines.masked_fill_(~self.is_finite[block, None], -torch.inf)
            similarity, slot = cosines.max(0)  # the first of equal ones: the lower index
            nearest = block[slot]
            is_lower = (similarity == self.similarity) & (nearest < self.nearest)
            is_closer = (similarity > self.similarity) | is_lower
            self.similarity = torch.where(is_closer, similarity, self.similarity)
            self.nearest = torch.where(is_closer, nearest, self.nearest)
        self.closest[chosen] = torch.inf


def _split(tokens: torch.Tensor) -> list[torch.Tensor]:
    """
    Tokens in parts, the columns of one matrix product each. A product may round its last, incomplete tile differently,
    so that equal tokens would have different cosines: all parts have the same size, a multiple of the tile, and the
    last one is padded. Padding copies one part, not all tokens.
    """
    count = -(-len(tokens) // _MAX_PART) if len(tokens) % _TILE else 1
    *parts, last = tokens.split(-(-len(tokens) // (count * _TILE)) * _TILE)
    return [*parts, _pad(last, len(parts[0]) if parts else _TILE)]


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, which would copy a single part, too."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _pad(tokens: torch.Tensor, multiple: int) -> torch.Tensor:
    """`tokens` with rows of zeros after them, up to a `multiple` of rows; not a copy if there are none to add."""
    missing = -len(tokens) % multiple
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def _farthest_first(
    closest: torch.Tensor, pairs: torch.Tensor, indices: list[int], bound: tuple[float, int], max_anchors: int
) -> list[int]:
    """
    Choose up to `max_anchors` anchors among candidates, each the farthest from all chosen so far. Stop as soon as
    another token might be farther than the next candidate.

    Args:
        closest (`torch.FloatTensor` of shape `(candidates,)`):
            Cosine of each candidate to the closest token chosen so far.
        pairs (`torch.FloatTensor` of shape `(candidates, candidates)`):
            Cosines among the candidates.
        indices (`list[int]`):
            Positions of the candidates in the row.
        bound (`tuple[float, int]`):
            The lowest bound of all other tokens, and the first position that has it.
        max_anchors (`int`):
            How many anchors to choose at most.

    Returns:
        Places among the candidates, in the order of their choice; at least one.
    """
    chosen: list[int] = []
    while len(chosen) < max_anchors:
        place = int(closest.argmin())
        # The first choice needs no bound: the candidates have the lowest values, and these are up to date.
        if chosen and (float(closest[place]), indices[place]) >= bound:
            break
        chosen.append(place)
        closest = torch.maximum(closest, pairs[place])
        closest[place] = torch.inf
    return chosen
