"""What became of the drafts of a lossless generation."""

from dataclasses import dataclass, field


@dataclass
class LosslessAccount:
    """Drafts of one call of `generate(lossless=True)`, all rows together.

    Args:
        plan: what drafted last, in short; empty: nothing did.
        drafted: tokens that were drafted.
        accepted: those of them that the full model would have chosen, too, and that are in the result.
        verifies: calls of the full model after the prompt.
        verified: tokens that these had.
        tokens: new ones, the one that comes with the prompt included.
        near_ties: tokens whose logit was so near to another's that rounding may decide; they were run again alone, as plain
            decoding does, where nothing but the model chooses tokens.
        drafting: what drafting has cost, in shares of the whole model (of one token each).
        drafting_read: the same in bytes of weights.
        rows: of the batch.
        plain: why tokens were decoded one by one, at first or from some token on; empty: they were not.
        by_margin: for each plan, how many tokens it drafted in each part of the margins of `draft_policy.EDGES`, and how many
            of them were kept.
    """

    plan: str = ""
    drafted: int = 0
    accepted: int = 0
    verifies: int = 0
    verified: int = 0
    tokens: int = 0
    near_ties: int = 0
    drafting: float = 0.0
    drafting_read: float = 0.0
    rows: int = 1
    plain: str = ""
    by_margin: dict[str, list[list[int]]] = field(default_factory=dict, repr=False)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_verify(self) -> float:
        """New tokens of a row for each call of the full model."""
        return (self.tokens / self.rows - 1) / max(self.verifies, 1)

    @property
    def work(self) -> float:
        """Work of a new token, drafts and rejected tokens included, as a share of the whole model's for one token."""
        return (self.verified + self.drafting) / max(self.tokens - self.rows, 1)

    @property
    def weights_read(self) -> float:
        """Bytes of weights read for a new token of each row, as a share of the whole model's: rows and drafts share a call."""
        return (self.verifies + self.drafting_read / self.rows) / max(self.tokens / self.rows - 1, 1)

    def summary(self) -> str:
        """One line."""
        if not self.drafted:
            return f"lossless: plain decoding at budget 1.0, because {self.plain or 'nothing was left to draft'}"
        then = f"; then plain decoding, because {self.plain}" if self.plain else ""
        return (
            f"lossless: {self.tokens_per_verify:.2f} tokens for each of {self.verifies} runs of the full model, "
            f"{self.accepted} of {self.drafted} drafted tokens kept ({self.acceptance:.0%}), drafts in {self.plan}; "
            f"a new token cost {self.work:.2f} of the whole model's work, and {self.weights_read:.2f} of its bytes"
            f"{then}"
        )
