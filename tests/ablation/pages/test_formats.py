"""Numbers as text."""

from ablation.pages.formats import degrees, duration

DURATIONS = {
    0.34: "0.3 s",
    9.97: "10 s",
    12: "12 s",
    59.6: "1.0 min",
    204: "3.4 min",
    3598: "1.0 h",
    4320: "1.2 h",
}


def test_duration_has_the_unit_in_which_it_says_something():
    assert {seconds: duration(seconds) for seconds in DURATIONS} == DURATIONS


def test_degrees_are_whole_but_for_welch():
    assert [degrees(6.0), degrees(1200.0), degrees(1.73)] == ["6", "1,200", "1.7"]
