"""The page in headless Chromium: pictures move, hints appear, and nothing old looks live."""

import re
import time
from typing import Any

import pytest

from sonoedge.runtime.hints import Text


def brightness(screen: Any) -> float:
    """Mean of the picture's canvas as it is drawn, before the style that dims it."""
    return float(
        screen.page.evaluate(
            "() => { const c = document.getElementById('picture'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; return d.reduce((a, b) => a + b) / d.length }"
        )
    )


def test_frames_move_and_hints_appear_with_confidence_age_and_the_model(screen: Any) -> None:
    screen.look("live")
    first = screen.frame()
    screen.page.wait_for_function(f"() => Number(document.getElementById('picture').dataset.frame) > {first + 10}")
    assert brightness(screen) > 70  # alpha alone gives 64
    screen.shows("#hints .answer", "liver")
    screen.shows("#hints .percent", "93 %")
    screen.shows("#hints .why", "kidney or liver (90 % coverage)")
    assert re.fullmatch(r"\d\.\d s", screen.page.inner_text("#hints .says .age >> nth=0"))
    assert screen.page.inner_text("#intended-use") == "For research and education only; never a diagnosis."
    counters = screen.page.inner_text("#counters")
    assert "model 3f5c0a3f5c0a" in counters
    assert "dropped 3" in counters
    assert "p50 11 p95 18 p99 24 ms" in counters


def test_an_uncertain_hint_names_what_it_may_be_but_no_guess(screen: Any, fake_server: Any) -> None:
    fake_server.reason = "low confidence"
    screen.shows("#hints .why", "low confidence · kidney or liver (90 % coverage)")
    screen.page.wait_for_function("() => document.querySelector('#hints .says') === null")
    screen.page.keyboard.press("l")
    screen.shows("#hints .why", "置信度低 · 肾脏或肝脏（覆盖率 90 %）")


def test_an_abstention_is_silence_with_its_reason(screen: Any, fake_server: Any) -> None:
    screen.shows("#hints .answer", "liver")
    fake_server.reason = "poor frame: in air"
    screen.shows("#hints .why", "poor frame: probe in air")
    screen.page.wait_for_function("() => document.querySelector('#hints .says') === null")
    said = screen.page.inner_text("#hints")
    assert "liver" not in said
    assert "%" not in said
    assert "93" not in screen.page.evaluate("() => document.querySelector('#hints').outerHTML")


@pytest.mark.parametrize(
    ("state", "headline"),
    [("lost", "SOURCE LOST"), ("stalled", "SOURCE STALLED"), ("waiting", "WAITING FOR THE SOURCE")],
)
def test_a_source_that_is_not_live_is_shown_over_a_dimmed_picture(
    screen: Any, fake_server: Any, state: str, headline: str
) -> None:
    screen.shows("#hints .answer", "liver")
    fake_server.detail, fake_server.state = "connected but no frames for 2.1 s", state
    screen.look("bad")
    screen.shows("#alarm strong", headline)
    assert "no frames for 2.1 s" in screen.page.inner_text("#alarm")
    assert re.search(r"this picture is \d+\.\d s old", screen.page.inner_text("#alarm"))
    assert float(screen.page.evaluate("() => getComputedStyle(document.getElementById('picture')).opacity")) < 0.3
    assert screen.page.locator("#hints .says").count() == 0
    fake_server.state = "live"
    screen.look("live")
    screen.shows("#hints .answer", "liver")


def test_a_silent_server_and_a_dead_viewer_are_shown(screen: Any, fake_server: Any, viewer: Any) -> None:
    screen.look("live")
    fake_server.silent = True
    began = time.monotonic()
    screen.look("bad")
    assert time.monotonic() - began < 3.0  # the picture's age tells it before the silence does
    screen.shows("#alarm strong", "NO CONNECTION TO THE SERVER")
    fake_server.silent = False
    screen.look("live")
    viewer.process.kill()
    screen.shows("#alarm strong", "THE VIEWER HAS STOPPED")
    assert screen.page.locator("#hints .says").count() == 0


def test_a_poor_picture_says_so(screen: Any, fake_server: Any) -> None:
    fake_server.poor = "poor contact"
    screen.shows("#corner", "poor contact · frame")


def test_it_speaks_chinese_and_is_used_by_keyboard(screen: Any) -> None:
    screen.shows("#hints .answer", "liver")
    screen.page.keyboard.press("l")
    screen.shows("#hints .answer", "肝脏")
    screen.shows("#source-state", "实时")
    assert screen.page.get_attribute("html", "lang") == "zh"
    screen.page.keyboard.press("?")
    assert screen.page.locator("#shortcuts").is_visible()
    screen.page.keyboard.press("Escape")
    assert screen.page.locator("#shortcuts").is_hidden()
    screen.page.evaluate("() => document.activeElement.blur()")
    order = []
    for _ in range(7):
        screen.page.keyboard.press("Tab")
        order.append(screen.page.evaluate("() => document.activeElement.id"))
    assert order == ["report-en", "report-zh", "freeze", "language", "help", "answer", "question"]


def test_everything_fits_a_seven_inch_screen(screen: Any, fake_server: Any) -> None:
    fake_server.name = "/media/ultrasound/" + "a-long-folder-name/" * 8 + "clip.mp4"
    fake_server.intended_use = "Research only, not a medical device; not for diagnosis or treatment decisions. " * 2
    fake_server.region = Text("irregular solid mass", "不规则实性肿块")
    screen.shows("#source-name", "clip.mp4")
    screen.shows("#intended-use", "treatment decisions")
    screen.shows("#hints .answer", "irregular solid mass")
    names = "#help header #stage #timeline #hints #hints>.says>.percent #answer #ask #cancel #intended-use #counters"
    for name in names.split():
        box = screen.page.locator(name).first.bounding_box()
        assert box["x"] >= 0, name
        assert box["y"] >= 0, name
        assert box["x"] + box["width"] <= 1024, name
        assert box["y"] + box["height"] <= 600, name
    for button in screen.page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 40
    assert screen.page.evaluate("() => document.documentElement.scrollHeight") <= 600
