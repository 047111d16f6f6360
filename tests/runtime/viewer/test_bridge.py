"""The bridge: newest wins for every page, guesses stay behind, ages are true, leaving a question cancels it."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import Text
from sonoedge.runtime.protocol import Answer, Ask, Report, Token
from sonoedge.runtime.viewer.board import Board, HintSeen, ServerSeen, SourceSeen
from sonoedge.runtime.viewer.bridge import Bridge
from sonoedge.runtime.viewer.clock import ServerClock, now_ms
from sonoedge.runtime.viewer.link import Link

YES = Text("yes", "有")


@contextlib.asynccontextmanager
async def running(server: Any) -> AsyncIterator[Bridge]:
    bridge = Bridge(Link(server.endpoint), server.hints_endpoint)
    task = asyncio.create_task(bridge.run())
    try:
        yield bridge
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


async def until(true: Callable[[], Any], timeout_s: float = 8.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)
    return found


def play(server: Any, scene: Callable[[Bridge], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with running(server) as bridge:
            await until(lambda: fake_is_up(server, bridge))
            await scene(bridge)

    asyncio.run(whole())


def fake_is_up(server: Any, bridge: Bridge) -> bool:
    return server.frame > 0 and bridge.board.server is not None and bridge.board.server.model is not None


def newest(board: Board, name: str) -> Any:
    """The newest hint of that name: the board orders by time, in which the hints of a frame overtake each other."""
    events = board.newer(0)[1]
    return next((event for event in events if isinstance(event, HintSeen) and event.hint == name), None)


def hint(captured_ms: float, text: Text | None = YES) -> HintSeen:
    return HintSeen("finding", text, 0.9 if text else None, None, (), None, 1, captured_ms, 1000)


def test_a_page_that_was_away_gets_the_newest_of_everything_once() -> None:
    async def scene() -> None:
        board = Board()
        board.put_source("live", "phantom", None)
        for number in range(500):
            board.put_hint(hint(float(number)))
        version, events = board.newer(0)
        assert [type(event) for event in events] == [SourceSeen, HintSeen]
        assert events[-1] == hint(499.0)
        board.put_source("live", "phantom", None)
        assert board.newer(version) == (version, [])

    asyncio.run(scene())


def test_every_page_wakes_for_every_change() -> None:
    async def scene() -> None:
        board = Board()
        waits = [asyncio.create_task(board.changed(0, 5.0)) for _ in range(3)]
        await asyncio.sleep(0.01)
        began = time.monotonic()
        board.put(ServerSeen(heard=True))
        await asyncio.gather(*waits)
        assert time.monotonic() - began < 1.0
        began = time.monotonic()
        await board.changed(1, 0.05)
        assert time.monotonic() - began >= 0.04

    asyncio.run(scene())


def test_the_history_keeps_every_change_and_little_else() -> None:
    async def scene() -> None:
        board, start = Board(), now_ms()
        for number in range(100):  # ten a second for ten seconds, with a change after five and back
            board.put_hint(hint(start + 100 * number, None if 50 <= number < 60 else YES))
        kept = board.history().hints
        assert [text for _, _, text in kept].count(None) == 1
        assert 8 <= len(kept) <= 14
        board.put_source("lost", "phantom", "gone")
        board.put_source("lost", "phantom", "still gone")
        assert [state for state, _ in board.history().states] == ["lost"]

    asyncio.run(scene())


def test_a_message_that_waited_on_its_way_is_as_old_as_it_is() -> None:
    clock = ServerClock()
    clock.heard(5000.0)  # at once
    here = clock.here(5000.0)
    time.sleep(0.2)
    clock.heard(5001.0)  # sent 1 ms later, read 200 ms later
    assert clock.here(5000.0) == here
    assert now_ms() - clock.here(5001.0) >= 190


def test_hints_reach_the_board_and_guesses_do_not(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        said = await until(lambda: newest(bridge.board, "region"))
        assert (said.text, said.probability, said.reason) == (Text("liver", "肝脏"), 0.93, None)
        either = (Text("kidney", "肾脏"), Text("liver", "肝脏"))  # in the schema's order
        said = await until(lambda: (one := newest(bridge.board, "region")).set == either and one)
        assert said.coverage == 0.9
        assert (await until(lambda: newest(bridge.board, "finding"))).set == ()
        fake_server.reason = "low confidence"
        silent = await until(lambda: (one := newest(bridge.board, "region")).text is None and one)
        assert (silent.probability, silent.reason, silent.set) == (None, "low confidence", either)
        fake_server.reason = "poor frame: in air"
        silent = await until(lambda: (one := newest(bridge.board, "region")).reason != "low confidence" and one)
        assert (silent.text, silent.reason, silent.set) == (None, "poor frame: in air", ())

    play(fake_server, scene)


def test_no_kind_is_shown_of_a_lesion_that_is_not_there(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        await until(lambda: (one := newest(bridge.board, "kind")) and one.text)
        await until(lambda: newest(bridge.board, "finding").text == Text("yes", "有"))
        fake_server.lesion = False
        await until(lambda: newest(bridge.board, "finding").text == Text("no", "无"))
        assert (newest(bridge.board, "kind").text, newest(bridge.board, "kind").reason) == (None, "not asked")
        fake_server.lesion = True
        await until(lambda: newest(bridge.board, "kind").text)
        fake_server.reason = "low confidence"
        await until(lambda: newest(bridge.board, "finding").text is None)
        assert newest(bridge.board, "kind").text is None

    play(fake_server, scene)


def test_pictures_are_fetched_once_for_all_pages_and_at_most_15_times_a_second(fake_server: Any) -> None:
    async def page(bridge: Bridge) -> list[int]:
        seen = []
        for _ in range(15):
            shot = await bridge.picture()
            assert shot.picture.jpeg.startswith(b"\xff\xd8")
            seen.append(shot.picture.frame)
        return seen

    async def scene(bridge: Bridge) -> None:
        began = time.monotonic()
        pages = await asyncio.gather(*(page(bridge) for _ in range(4)))
        assert fake_server.pictures <= min(15 + 3, (time.monotonic() - began) * 15 + 1)
        for seen in pages:
            assert seen == sorted(seen)
            assert seen[0] < seen[-1]

    play(fake_server, scene)


def test_an_answer_streams_and_leaving_it_cancels_it(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        replies = [heard.reply async for heard in bridge.ask(Ask("one", "Is a lesion visible?"))]
        assert [type(reply) for reply in replies] == [Token, Token, Token, Answer]
        assert isinstance(replies[-1], Answer)
        assert replies[-1].answer == "No lesion is visible."
        fake_server.tokens, fake_server.token_s = ("on ",) * 1000, 0.02
        async with contextlib.aclosing(bridge.ask(Ask("two", "Go on"))) as endless:
            assert isinstance((await anext(endless)).reply, Token)
            with pytest.raises(SonoEdgeError, match="'two' is the id of a question that is being answered"):
                await anext(bridge.ask(Ask("two", "Again?")))
        await until(lambda: "Cancel" in fake_server.requests)

    play(fake_server, scene)


def test_a_frozen_picture_stays_until_it_is_released(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        frozen = await bridge.freeze("here", release=False)
        await until(lambda: fake_server.frame > frozen.frame)
        assert (await bridge.frozen_picture("here")).picture.frame == frozen.frame
        assert (await bridge.picture()).picture.frame > frozen.frame
        *_, last = [heard.reply async for heard in bridge.ask(Report("one", "zh", ("here",)))]
        assert isinstance(last, Answer)
        assert (last.frame, fake_server.reports) == (frozen.frame, ["zh"])
        assert (await bridge.freeze("here", release=True)).released
        fake_server.refuses_to_freeze = True
        with pytest.raises(SonoEdgeError, match="8 frames"):
            await bridge.freeze("there", release=False)

    play(fake_server, scene)


def test_the_end_of_the_viewer_releases_what_it_froze(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        for name in ("here", "there"):
            await bridge.freeze(name, release=False)
        assert len(fake_server.frozen) == 2

    play(fake_server, scene)
    assert fake_server.frozen == {}


def test_hints_of_another_server_are_not_shown(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        await until(lambda: newest(bridge.board, "region"))
        fake_server.published_model = "0" * 60
        seen = await until(lambda: (one := bridge.board.server) and "model 000000000000" in (one.detail or "") and one)
        assert re.search("says hints of model 000000000000 about phantom, not those of .*--hints", seen.detail)
        assert not seen.heard
        version = bridge.board.newer(0)[0]
        frame = fake_server.frame
        await until(lambda: fake_server.frame > frame + 5)
        assert not [event for event in bridge.board.newer(version)[1] if isinstance(event, HintSeen)]
        fake_server.model = fake_server.published_model  # the server was started again with another bundle
        await until(lambda: (one := bridge.board.server) and one.heard and one.model == "0" * 60)
        await until(lambda: newest(bridge.board, "region").frame > frame)

    play(fake_server, scene)


def test_a_refusal_is_an_error_for_every_page_that_waits(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        fake_server.blind = True
        waits = await asyncio.gather(*(bridge.picture() for _ in range(20)), return_exceptions=True)
        assert {str(error) for error in waits} == {"no frame yet: the source is waiting"}

    play(fake_server, scene)


def test_pages_that_wait_for_a_silent_server_do_not_pile_up(fake_server: Any) -> None:
    async def scene(bridge: Bridge) -> None:
        fake_server.silent = True
        before = len(asyncio.all_tasks())
        began = time.monotonic()
        for _ in range(2):
            waits = await asyncio.gather(*(bridge.picture() for _ in range(50)), return_exceptions=True)
            assert all(isinstance(error, SonoEdgeError) for error in waits)
        assert time.monotonic() - began < 20  # one after another they would take 200 s
        assert len(asyncio.all_tasks()) <= before + 1

    play(fake_server, scene)


def test_no_server_is_told(fake_server: Any) -> None:
    async def scene() -> None:
        fake_server.stop()
        async with running(fake_server) as bridge:
            with pytest.raises(SonoEdgeError, match="has no server: start `sonoedge serve`"):
                await bridge.picture()
            seen = await until(lambda: bridge.board.server)
            assert not seen.heard
            assert "nothing published" in seen.detail

    asyncio.run(scene())
