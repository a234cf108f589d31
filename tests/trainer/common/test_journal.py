import gc

from trainer.common import journal


def test_the_collector_rests_while_lines_are_read_and_goes_on_after_them(monkeypatch):
    """It would look at 100,000 entries again and again."""
    loads, seen = journal.json.loads, []
    monkeypatch.setattr(
        journal.json, "loads", lambda text: seen.append(gc.isenabled()) or loads(text)
    )
    data = journal.lines([["a", 1], ["b", 2]])
    assert journal.parse(data, str, int) == ([["a", 1], ["b", 2]], True)
    assert seen == [False, False] and gc.isenabled()
