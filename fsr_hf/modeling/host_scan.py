"""
Scan on the CPU: the same choice as one anchor after the other, in products of matrices.

What a token's closest chosen token is can only come closer, so the value of an earlier moment is a lower bound. Of the
few tokens with the lowest bounds, the pool, all pairs are computed, and anchors are chosen among them for as long as
the next one is farther than every bound outside. Then one product brings the values of all tokens up to date. So
nearly all work is that of the cosines between anchors and tokens, which Refine needs anyway, and memory grows with the
number of tokens, not with its square.
"""

import torch


__all__ = ["can_scan_on_host", "scan_on_host"]

_SMALL = 256  # tokens up to which one anchor after the other is as fast
_MEDIUM = 1024  # tokens up to which all pairs follow where a small pool had few anchors
_TILE = 64  # columns of a product, a multiple of what every library computes alike
_ROWS = 16  # the same for rows
_PART = 1024  # tokens that are padded at once
_MIN_POOL, _MAX_POOL = 128, 512


def can_scan_on_host(features: torch.Tensor) -> bool:
    """Whether values may steer the loop: on the CPU, but not in a trace of the code, and where it pays."""
    return features.device.type == "cpu" and features.shape[1] > _SMALL and not torch.compiler.is_compiling()


def scan_on_host(
    features: torch.Tensor, mask: torch.Tensor, focus: torch.Tensor, num_anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Eqs. 5 and 8 on the CPU.

    Args:
        features (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The tokens.
        mask (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            True for real tokens.
        focus (`torch.LongTensor` of shape `(batch, width)`):
            The Focus tokens, at least one in a row that gets anchors; `num_tokens` stands for none.
        num_anchors (`torch.LongTensor` of shape `(batch,)`):
            How many tokens to add, no more than there are.

    Returns:
        The anchors in the order of their choice, `(batch, width - 1)`, filled up with `num_tokens`; the anchor that is
        most similar to each token, `(batch, num_tokens)`; and its cosine, -inf if there is none or the token is not
        finite.
    """
    batch, num_tokens, _ = features.shape
    anchors = focus.new_full((batch, focus.shape[1] - 1), num_tokens)
    nearest = focus.new_full((batch, num_tokens), -1)
    similarity = torch.full((batch, num_tokens), -torch.inf)
    for row, number in enumerate(num_anchors.tolist()):
        if number > 0:
            pool = _Pool(features[row], mask[row], focus[row][focus[row] < num_tokens])
            anchors[row, :number] = pool.choose(number)
            nearest[row], similarity[row] = pool.nearest, pool.similarity.masked_fill_(~pool.is_finite, -torch.inf)
    return anchors, nearest, similarity


class _Pool:
    """
    The tokens of one row.

    Args:
        features (`torch.FloatTensor` of shape `(num_tokens, hidden_size)`), mask (`torch.BoolTensor`):
            Tokens, and which of them are real.
        focus (`torch.LongTensor`):
            Those that are chosen already.
    """

    def __init__(self, features, mask, focus):
        self.num_tokens, self.hidden_size = features.shape
        self.tokens = features.float().contiguous()
        norm = torch.linalg.vector_norm(self.tokens, dim=-1)
        if not ((norm > 2.0**-40) & (norm < 2.0**40)).all():  # squares out of range, zero vectors, NaN
            peak = torch.maximum(self.tokens.amax(-1), -self.tokens.amin(-1))
            self.tokens = self.tokens / peak.masked_fill(peak == 0, 1.0)[:, None]
            norm = torch.linalg.vector_norm(self.tokens, dim=-1)
            norm.masked_fill_(norm == 0, 1.0)
        self.is_finite = norm.isfinite()
        self.is_all_finite = bool(self.is_finite.all())
        self.scale = norm.reciprocal_()
        self.parts = _split(self.tokens)
        self.pairs = None  # cosines of all tokens to all, once they are needed

        self.nearest = torch.full((self.num_tokens,), -1)
        self.similarity = torch.full((self.num_tokens,), -torch.inf)
        # Cosine of each token to the closest one chosen so far; infinity takes a token out of the choice.
        self.closest = torch.full((self.num_tokens,), -1.0)
        for block in focus.split(_MAX_POOL):
            self.closest = torch.maximum(self.closest, self._to_all(block).amax(0))
        self.closest.masked_fill_(~mask, torch.inf)[focus] = torch.inf

    def _to_all(self, chosen: torch.Tensor) -> torch.Tensor:
        """Cosines of the tokens `chosen` to all, `(chosen, num_tokens)`."""
        if self.pairs is not None:
            return self.pairs[chosen]
        return self._to_parts(_pad(self.tokens.index_select(0, chosen), _ROWS), self.scale[chosen])

    def _among(self, pool: torch.Tensor) -> torch.Tensor:
        """Cosines of the tokens of a pool, ascending, to each other, `(pool, pool)`."""
        if len(pool) < self.num_tokens:
            tokens = _pad(self.tokens.index_select(0, pool), _TILE)
            return self._scaled(tokens @ tokens.mT, self.scale[pool], self.scale[pool])
        if self.pairs is None:
            scales = self.scale.split(len(self.parts[0]))
            self.pairs = _join([self._to_parts(*rows) for rows in zip(self.parts, scales)], dim=0)
        return self.pairs

    def _to_parts(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Cosines of `rows`, which may end in padding, to all tokens."""
        return self._scaled(_join([rows @ part.mT for part in self.parts], dim=1), scale, self.scale)

    def _scaled(self, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """From products to cosines, without the padding. `rows` and `columns` are the scales of both sides."""
        cosines = products[: len(rows), : len(columns)].mul_(columns).mul_(rows[:, None]).clamp_(-1.0, 1.0)
        return cosines if self.is_all_finite else cosines.nan_to_num_(nan=-1.0)

    def choose(self, number: int) -> torch.Tensor:
        """The next `number` anchors in the order of their choice."""
        anchors: list[torch.Tensor] = []
        size, spent = min(_MIN_POOL, self.num_tokens), 0
        while number > 0:
            # All pairs at once are no more than twice the features, and end a search that finds few in a pool.
            if 2 * spent > self.num_tokens**2 and self.num_tokens <= 2 * self.hidden_size:
                size = self.num_tokens
            order = self.closest.sort(stable=True)
            pool = order.indices[:size].sort().values  # ascending: the first of equal ones has the lowest index
            bound = (float(order.values[size]), int(order.indices[size])) if size < self.num_tokens else (torch.inf, 0)
            pairs = self._among(pool)
            most = number if size == self.num_tokens else min(number, size // 2)
            chosen = pool[_farthest_first(self.closest[pool], pairs, pool.tolist(), bound, most)]
            anchors.append(chosen)
            self._add(chosen.sort().values)
            number -= len(chosen)
            spent += size**2 + len(chosen) * self.num_tokens
            if len(chosen) < size // 16 and self.num_tokens <= _MEDIUM:
                size = self.num_tokens
            elif len(chosen) < size // 4:
                size = min(2 * size, max(_MAX_POOL, size), self.num_tokens)
        return torch.cat(anchors)

    def _add(self, chosen: torch.Tensor) -> None:
        """Make the tokens `chosen`, ascending, anchors."""
        for block in chosen.split(_MAX_POOL):
            cosines = self._to_all(block)
            self.closest = torch.maximum(self.closest, cosines.amax(0))
            if not self.is_all_finite:
                cosines.masked_fill_(~self.is_finite[block, None], -torch.inf)
            similarity, slot = cosines.max(0)  # the first of equal ones, which is the lower index
            nearest = block[slot]
            is_lower = (similarity == self.similarity) & (nearest < self.nearest)
            is_closer = (similarity > self.similarity) | is_lower
            self.similarity = torch.where(is_closer, similarity, self.similarity)
            self.nearest = torch.where(is_closer, nearest, self.nearest)
        self.closest[chosen] = torch.inf


def _split(tokens: torch.Tensor) -> list[torch.Tensor]:
    """
    Tokens as the columns of products. The last, incomplete tile of a product may be rounded in another way, so that
    equal tokens would differ: all parts have one size, a multiple of the tile, and the last is padded.
    """
    number = -(-len(tokens) // _PART) if len(tokens) % _TILE else 1
    *parts, last = tokens.split(-(-len(tokens) // (number * _TILE)) * _TILE)
    return [*parts, _pad(last, len(parts[0]) if parts else _TILE)]


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """No copy of a single one."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _pad(tokens: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zeros below, up to a multiple of rows; no copy if there is nothing to do."""
    missing = -len(tokens) % multiple
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def _farthest_first(
    closest: torch.Tensor, pairs: torch.Tensor, indices: list[int], bound: tuple[float, int], most: int
) -> list[int]:
    """
    Places in the pool of up to `most` anchors, as long as none outside comes first: that of `bound`, a lower bound of
    the cosine of every token outside and the index of the first that has it.
    """
    chosen: list[int] = []
    while len(chosen) < most:
        place = int(closest.argmin())
        # The first is the farthest of all.
        if chosen and (float(closest[place]), indices[place]) >= bound:
            break
        chosen.append(place)
        closest = torch.maximum(closest, pairs[place])
        closest[place] = torch.inf
    return chosen
