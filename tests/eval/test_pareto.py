"""Which points no other beats."""

from quantkit.eval.report.pareto import Point, front

POINTS = [
    Point("rtn", 4.25, 9.50), Point("gptq", 4.25, 9.46), Point("sinq", 4.5, 9.47), Point("rtn", 3.3, 9.81),
    Point("gptq", 3.3, 9.59), Point("flat", 3.3, 9.59),
]  # fmt: skip


def test_the_front_rises_with_the_bits():
    assert front(POINTS) == [Point("gptq", 3.3, 9.59), Point("gptq", 4.25, 9.46)]
    assert front([]) == []


def test_where_higher_is_better():
    assert front(POINTS, higher_is_better=True) == [Point("rtn", 3.3, 9.81)]
    assert front([Point("a", 3, 0.5), Point("b", 4, 0.7)], higher_is_better=True) == [("a", 3, 0.5), ("b", 4, 0.7)]
