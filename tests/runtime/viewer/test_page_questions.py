"""The page in headless Chromium: questions, reports and frozen pictures; what the server says stays text."""

import re
import time
from typing import Any

import pytest

from sonoedge.runtime.hints import Text

EVIL = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"


def test_a_question_is_answered_as_it_is_written_and_can_be_cancelled(screen: Any, fake_server: Any) -> None:
    fake_server.token_s = 0.4
    screen.page.keyboard.press("/")
    screen.page.keyboard.type("Is a lesion visible?")
    screen.page.keyboard.press("Enter")
    screen.shows("#answer p", "No lesion")
    assert re.fullmatch(r"frame \d+, \d\.\d s old · model 3f5c0a3f5c0a", screen.page.inner_text("#answer small"))
    screen.shows("#answer p", "No lesion is visible.")
    screen.shows("#answer small", "answered in 0.1 s")
    assert re.search(r"frame \d+, \d\.\d s old · answered", screen.page.inner_text("#answer small"))
    fake_server.tokens, fake_server.token_s = ("and ",) * 500, 0.1
    screen.page.keyboard.type("Go on")
    screen.page.keyboard.press("Enter")
    screen.shows("#answer p", "and and")
    screen.page.keyboard.press("Escape")
    screen.shows("#answer small", "cut short: cancelled")
    assert screen.page.is_enabled("#ask [type=submit]")


def test_text_of_the_server_stays_text(screen: Any, fake_server: Any) -> None:
    fake_server.region, fake_server.tokens, fake_server.name = Text(EVIL, EVIL), (EVIL,), EVIL
    screen.page.fill("#question", EVIL)
    screen.page.press("#question", "Enter")
    screen.shows("#answer p", EVIL)
    screen.shows("#hints .answer", EVIL)
    screen.shows("#source-name", EVIL)
    fake_server.detail, fake_server.state = EVIL, "lost"
    screen.shows("#alarm span", EVIL)
    assert screen.page.title() == "SonoEdge"
    assert screen.page.locator("main img, main script").count() == 0
    with pytest.raises(Exception, match="TrustedHTML"):
        screen.page.evaluate("() => { document.getElementById('answer').innerHTML = '<b>x</b>' }")


def test_frozen_never_looks_live_and_questions_are_about_what_is_shown(screen: Any, fake_server: Any) -> None:
    screen.shows("#hints .answer", "liver")
    screen.page.keyboard.press("f")
    screen.look("frozen")
    kept = screen.frame()
    assert [number for number, _ in fake_server.frozen.values()] == [kept]
    time.sleep(1.2)
    assert screen.frame() == kept
    screen.shows("#alarm", "FROZEN")
    assert re.search(r"this picture is \d\.\d s old", screen.page.inner_text("#alarm"))
    screen.shows("#hints .why", "frame ")
    screen.page.keyboard.press("r")
    screen.shows("#answer small", f"frame {kept}, ")
    screen.shows("#answer small", "answered in")
    assert fake_server.reports == ["en"]
    screen.page.keyboard.press("f")
    screen.look("live")
    screen.page.wait_for_function(f"() => Number(document.getElementById('picture').dataset.frame) > {kept}")
    assert fake_server.frozen == {}
    screen.page.click("#report-zh")
    screen.shows("#answer h3", "Report in Chinese")
    screen.page.wait_for_function("() => document.querySelectorAll('#answer small').length === 2")
    assert fake_server.reports == ["en", "zh"]


def test_a_refused_freeze_leaves_the_page_live_and_says_why(screen: Any, fake_server: Any) -> None:
    fake_server.refuses_to_freeze = True
    screen.page.keyboard.press("f")
    screen.shows("#answer .refused", "8 frames are frozen")
    screen.look("live")
    assert screen.page.get_attribute("#freeze", "aria-pressed") == "false"


def test_leaving_the_page_releases_what_it_froze(screen: Any, fake_server: Any) -> None:
    screen.page.keyboard.press("f")
    screen.look("frozen")
    assert len(fake_server.frozen) == 1
    screen.page.goto("about:blank")
    end = time.monotonic() + 5
    while fake_server.frozen and time.monotonic() < end:
        time.sleep(0.05)
    assert fake_server.frozen == {}
