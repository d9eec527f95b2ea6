import pytest
import torch

from asyncllm.executor.logprobs import concatenate, score


@pytest.mark.parametrize("vocab_size", [5, 300, 20_000, 49_152])
@pytest.mark.parametrize("num_alternatives", [0, 1, 5, 20])
def test_scores_equal_log_softmax_and_its_order(vocab_size, num_alternatives):
    generator = torch.Generator().manual_seed(vocab_size + num_alternatives)
    logits = torch.randn(7, vocab_size, generator=generator) * 4
    targets = torch.randint(0, vocab_size, (7,), generator=generator)
    expected = torch.log_softmax(logits.double(), -1)
    entries = score(logits, targets, num_alternatives).to_host([num_alternatives] * 7)
    for row, entry in enumerate(entries):
        assert entry.token_id == targets[row]
        assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-5)
        assert entry.rank == 1 + int((logits[row] > logits[row, entry.token_id]).sum())
        assert len(entry.top_token_ids) == len(entry.top_logprobs) == min(num_alternatives, vocab_size)
        order = expected[row].sort(descending=True)
        assert entry.top_token_ids == order.indices[:num_alternatives].tolist()
        assert entry.top_logprobs == pytest.approx(order.values[:num_alternatives].tolist(), abs=1e-5)


def test_alternatives_of_equal_logits_come_in_order_of_their_ids():
    logits = torch.zeros(1, 20_000)
    logits[0, [900, 40, 7]] = 1.0
    (entry,) = score(logits, torch.tensor([40]), 4).to_host([4])
    assert entry.top_token_ids[:3] == [7, 40, 900]
    assert entry.rank == 1


def test_each_row_gets_as_many_alternatives_as_it_asked_for():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    entries = score(logits, torch.tensor([1, 2, 3]), 5).to_host([0, 5, 2])
    assert [len(entry.top_token_ids) for entry in entries] == [0, 5, 2]


def test_scoring_leaves_the_logits_alone_and_parts_join_in_order():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    before, targets = logits.clone(), torch.arange(6)
    whole = score(logits, targets, 3).to_host([3] * 6)
    assert torch.equal(logits, before)
    parts = [score(logits[i : i + 2], targets[i : i + 2], 3) for i in (0, 2, 4)]
    joined = concatenate(parts).to_host([3] * 6)
    assert [entry.top_token_ids for entry in joined] == [entry.top_token_ids for entry in whole]
    assert score(logits[:0], targets[:0], 3).to_host([]) == []
