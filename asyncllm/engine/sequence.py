"""One sequence being generated: its tokens, how far they are computed, and what it holds.

Plain state that the scheduler moves; knows no policy and no tensors. Engine thread only.
"""

from array import array
from enum import Enum

from asyncllm.engine.block_pool import Block, TrieParent
from asyncllm.engine.prompt_lookup import Drafter
from asyncllm.types import Pooling, Submit

NO_SLOT = -1


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request inside the engine, from `Submit` to `Finished`.

    Three counters say how far it is, each at most the one before it:
    `len(tokens) + num_in_flight`: tokens that exist, the last ones perhaps only on the device (while drafts are
    verified: tokens that may exist);
    `num_computed_tokens`: tokens whose KV is in the cache once every launched step is done;
    `num_committed_tokens`: the same for the steps the host has seen the end of.
    """

    __slots__ = (
        "adapter",
        "blocks",
        "cache_parent",
        "cache_salt",
        "constraint",
        "draft",
        "drafter",
        "epoch",
        "followers",
        "has_extras",
        "is_complete",
        "max_length",
        "needs_last_token",
        "num_blocks_wanted",
        "num_cached_tokens",
        "num_committed_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_pooled_tokens",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "order",
        "params",
        "request_id",
        "samples_in_slot",
        "slot",
        "status",
        "stop_token_ids",
        "tokens",
    )

    def __init__(self, submit: Submit, max_length: int) -> None:
        """`max_length`: tokens of prompt plus output at which generation ends, whatever ends it."""
        params = submit.params
        self.request_id = submit.request_id
        self.params = params
        self.adapter = submit.adapter
        # Keys and values behind one adapter are of no use to another.
        self.cache_salt: TrieParent = (submit.adapter, submit.cache_salt) if submit.adapter else submit.cache_salt
        # Sorts the waiting and the running alike; a preempted sequence keeps it, and so its place in the queue.
        self.order = (submit.priority, submit.arrival_s, submit.request_id)
        self.status = SequenceStatus.WAITING

        self.tokens: array[int] = array("I", submit.prompt_token_ids)  # prompt, then output
        self.num_prompt_tokens = len(self.tokens)
        self.max_length = max_length
        self.num_in_flight = 0  # tokens sampled by launched steps, not yet committed
        self.num_computed_tokens = 0
        self.num_committed_tokens = 0
        self.num_cached_tokens: int | None = None  # prefix hit when first scheduled; None before
        self.num_prompt_logprobs = 0  # prompt positions whose log-probabilities were handed out
        # Prompt tokens at the beginning whose hidden states nobody waits for: handed out, or never asked for.
        self.num_pooled_tokens = _first_pooled(submit.pooling, self.num_prompt_tokens)

        self.slot = NO_SLOT
        self.samples_in_slot = False  # the slot holds the last token on the device: the next row can be a decode row
        self.blocks: list[Block] = []
        self.num_blocks_wanted = 1  # free blocks below which it is not worth trying to admit it
        self.cache_parent: TrieParent = self.cache_salt  # where its next full block hangs in the prefix trie
        self.epoch = 0  # bumped when it leaves its slot: rows of an older epoch are not committed
        self.followers: list[Sequence] | None = None  # siblings that wait for this one's prompt
        self.constraint = submit.constraint  # has accepted every token of the output
        self.is_complete = False  # by its constraint, nothing may follow

        self.drafter: Drafter | None = None
        self.draft: list[int] = []  # guesses at the next tokens, to be verified by its next row

        # Read in the hot loop, so worked out once.
        self.stop_token_ids = frozenset(params.stop_token_ids)
        # The plan of its next step depends on the value of its last token, so it cannot be planned ahead of the device.
        self.needs_last_token = self.constraint is not None or any(len(word) > 1 for word in params.bad_words)
        self.has_extras = bool(
            self.constraint is not None
            or params.bad_words
            or (params.min_tokens and params.stop_token_ids)
            or params.logprobs is not None
            or params.prompt_logprobs is not None
            or submit.pooling is not None
        )

    @property
    def may_draft(self) -> bool:
        """Whether its tokens may be verified several at a time: none depends on the output before it but through KV."""
        return not (self.has_extras or self.params.has_penalties) and self.max_length > self.num_prompt_tokens + 1

    def begin_to_draft(self, drafter: Drafter) -> None:
        """Have guesses at its tokens verified from now on; each of its rows is looked at once it is committed."""
        self.drafter = drafter
        self.has_extras = True

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated and committed."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def prompt_is_committed(self) -> bool:
        """Whether the whole prompt's KV is in the cache for others to find."""
        return self.num_committed_tokens >= self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}, {self.status.value}, "
            f"tokens={self.num_prompt_tokens}+{self.num_output_tokens}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_in_flight}, slot={self.slot}, "
            f"blocks={len(self.blocks)}, epoch={self.epoch})"
        )


def _first_pooled(pooling: Pooling | None, num_prompt_tokens: int) -> int:
    """The first prompt token whose hidden state is asked for; the end of the prompt where none is."""
    if pooling is None:
        return num_prompt_tokens
    return num_prompt_tokens - 1 if pooling is Pooling.LAST else 0
