"""Tests that a run continues if its operations cannot be counted."""

from peft_jax.training import run, step_flops


def test_uncountable_operations_are_reported_once(tiny, tmp_path, monkeypatch, listener):
    def fail(*_):
        raise NotImplementedError("no rule for the product 'fancy_dot'")

    monkeypatch.setattr(step_flops, "count_jaxpr", fail)
    monkeypatch.setattr(step_flops, "count_flops", fail)
    summary = run(tiny(train__steps=2), tmp_path / "run", reporter=listener)
    assert summary["flops_per_step"] is None
    assert summary["flops_per_second"] is None
    assert summary["utilization"] is None
    said = [line for line in listener.said if "not counted, so" in line]
    assert len(said) == 1
    assert "NotImplementedError: no rule for the product 'fancy_dot'" in said[0]
    assert "operations not counted" in listener.text
    page = (tmp_path / "run" / "report" / "README.md").read_text()
    assert "operations a second" not in page


def test_counted_operations_give_no_message(tiny, tmp_path, listener):
    summary = run(tiny(train__steps=2), tmp_path / "run", reporter=listener)
    assert summary["flops_per_step"] > 0
    assert "not counted" not in listener.text
