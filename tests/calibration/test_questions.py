"""Every kind of exchange that EchoVLM's files hold is told apart, and its choices are read."""

import pytest

from sonoedge.calibration.conversations import Conversation, Turn
from sonoedge.calibration.questions import Question, Task, options, questions


def one(question: str, answer: str) -> Question:
    (found,) = questions(Conversation("x", ("a.png",), (Turn("human", "<image>" + question), Turn("gpt", answer))))
    return found


@pytest.mark.parametrize(
    ("question", "answer", "task", "kind"),
    [
        ("请描述这张图。", "左侧乳腺探及一呈圆形、边界清晰的无回声区，后方伴强回声增强。", Task.REPORT, "description"),
        ("请为这几张图写一份报告，包括超声所见和诊断。", "甲状腺大小正常。未见结节。", Task.REPORT, "report"),
        ("请写出超声所见。", "肝脏大小形态正常，包膜光整，回声均匀。", Task.REPORT, "findings"),
        ("只输出诊断提示，不用写超声所见。", "肝脏多发囊肿，建议三个月后复查超声。", Task.REPORT, "impression"),
        ("Write a report.", "The liver is normal. No focal lesion.", Task.REPORT, "report"),
        ("这是哪个部位？", "甲状腺", Task.VQA, "open question"),
        ("Which side?", "On the left.", Task.VQA, "open question"),
        ("描述与图像相符吗？只需回答True/False", "True", Task.VQA, "true or false"),
        ("关于这张图像的描述是否正确？", "Ture", Task.VQA, "true or false"),
        ("图中有病灶吗？", "是。", Task.VQA, "true or false"),
        ("哪一项正确？A. 囊肿 B. 结节", "B", Task.DIAGNOSIS, "single choice"),
    ],
)
def test_an_exchange_is_told_by_its_question_and_answer(question: str, answer: str, task: Task, kind: str) -> None:
    found = one(question, answer)
    assert (found.task, found.kind) == (task, kind)
    assert found.text == question
    assert found.references == (answer,)


@pytest.mark.parametrize(
    ("answer", "candidates", "right"),
    [
        ("B", ("A", "B", "C"), 1),
        ("c", ("A", "B", "C"), 2),
        ("答案：A", ("A", "B", "C"), 0),
        ("B. 实性结节", ("A. 囊肿", "B. 实性结节", "C. 钙化"), 1),
        ("C、钙化。", ("A、囊肿", "B、实性结节", "C、钙化"), 2),
        ("囊肿", ("囊肿", "实性结节", "钙化"), 0),
        ("B。因为边界光滑", ("A", "B", "C"), 1),
    ],
)
def test_candidates_are_worded_as_the_answer_is(answer: str, candidates: tuple[str, ...], right: int) -> None:
    found = one("图中所见是？A. 囊肿 B. 实性结节 C. 钙化", answer)
    assert (found.candidates, found.right) == (candidates, right)
    assert found.classes == ("囊肿", "实性结节", "钙化")


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("What? A. one B. two", {"A": "one", "B": "two"}),
        (
            "请选择。\nA、左侧乳腺囊肿；\nB、右侧乳腺囊肿；\nC、正常",
            {"A": "左侧乳腺囊肿", "B": "右侧乳腺囊肿", "C": "正常"},
        ),
        ("选项：(A) 良性 (B) 恶性", {"A": "良性", "B": "恶性"}),
        ("Vitamin A. Is it there?", {}),
        ("A. one C. three", {}),
        ("no list", {}),
    ],
)
def test_options_are_letters_in_their_order(text: str, listed: dict[str, str]) -> None:
    assert options(text) == listed


def test_an_answer_that_is_no_option_is_scored_as_a_text() -> None:
    assert one("A. 囊肿 B. 结节", "F").candidates == ()


def test_the_candidates_of_a_judgement_are_spelt_as_the_answer() -> None:
    assert one("Right?", "true").candidates == ("true", "false")
    assert one("Right?", "False").candidates == ("True", "False")
    assert (one("对吗？", "错误").candidates, one("对吗？", "错误").right) == (("正确", "错误"), 1)


def test_later_turns_know_those_before() -> None:
    turns = (
        Turn("system", "s"),
        Turn("human", "<image><image>Where?"),
        Turn("gpt", "Liver"),
        Turn("human", "Sure?"),
        Turn("gpt", "Yes"),
    )
    first, second = questions(Conversation(1, ("a", "b"), turns))
    assert (first.turns, second.turns) == ((), (("Where?", "Liver"),))
    assert second.candidates == ("Yes", "No")


def test_the_language_is_that_of_a_text_s_answer_and_else_of_the_question() -> None:
    assert one("Describe it in Chinese.", "左侧乳腺探及一呈圆形、边界清晰的无回声区。").language == "zh"
    assert one("Is it? A. 囊肿 B. 结节", "A").language == "zh"
    assert one("Is it?", "yes").language == "en"
