"""The words around the hint schema's own: other ways to ask, and the sentences of reports, in English and Chinese."""

REPORT = "report"
DIAGNOSIS = "diagnosis"

# the canonical wording of the hints is the schema's; these are other ways to ask the same
PARAPHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "region": {
        "en": (
            "Which part of the body is this?",
            "What region does this scan show?",
            "Name the region.",
            "What is being scanned?",
        ),
        "zh": ("这是哪个部位的超声？", "这幅图像是哪个部位？", "请说出检查部位。", "扫查的是什么部位？"),
    },
    "quality": {
        "en": (
            "What is the image quality?",
            "Is the image quality good or poor?",
            "Rate the image quality.",
            "How is the quality?",
        ),
        "zh": ("图像质量怎么样？", "请评价图像质量。", "图像质量是良好还是较差？", "这幅图像清晰吗？"),
    },
    "finding": {
        "en": ("Is there a lesion?", "Do you see a lesion?", "Does the image show a lesion?", "Any lesion here?"),
        "zh": ("有没有病灶？", "图中有病灶吗？", "是否发现病灶？", "能看到病灶吗？"),
    },
    "kind": {
        "en": (
            "Which kind of lesion is this?",
            "What type is the lesion?",
            "How would you classify the lesion?",
            "Name the kind of lesion.",
        ),
        "zh": ("这是哪一类病灶？", "病灶是什么类型？", "请对病灶分类。", "属于什么病灶？"),
    },
    "side": {
        "en": (
            "Is the lesion on the left or the right?",
            "Which side is the lesion on?",
            "On which side does it lie?",
            "Left or right?",
        ),
        "zh": ("病灶在左侧还是右侧？", "病灶在哪一侧？", "病灶位于哪边？", "左侧还是右侧？"),
    },
    DIAGNOSIS: {
        "en": (
            "Choose the best answer.",
            "Which option fits the image?",
            "Select one option.",
            "Pick the right option.",
        ),
        "zh": ("请选择最合适的选项。", "哪个选项符合图像？", "请单选。", "请选出正确选项。"),
    },
    REPORT: {
        "en": (
            "Describe this ultrasound image.",
            "Please report this scan.",
            "Give a brief report.",
            "What does the image show?",
        ),
        "zh": ("请描述这幅超声图像。", "请为这幅图像写报告。", "请给出简要报告。", "图像显示了什么？"),
    },
}
OWN_QUESTIONS = {
    DIAGNOSIS: {"en": "What is the finding?", "zh": "图像所见是什么？"},
    REPORT: {"en": "Write a short report.", "zh": "请写一份简短报告。"},
}
NO_LESION = {"en": "no lesion", "zh": "无病灶"}

REPORTS: dict[str, tuple[tuple[str, str, str], ...]] = {  # opening, with a lesion, without one
    "en": (
        (
            "Ultrasound of the {region}, image quality {quality}.",
            "{A kind} of about {size} mm lies {depth} on the {side}. {sign}",
            "No lesion is seen.",
        ),
        (
            "The image shows the {region}; its quality is {quality}.",
            "There is {a kind} on the {side} side, {depth}, about {size} mm across. {sign}",
            "There is no lesion.",
        ),
        (
            "Region: {region}. Quality: {quality}.",
            "Finding: {kind}, {side}, {depth}, {size} mm.",
            "Finding: no lesion.",
        ),
    ),
    "zh": (
        ("{region}超声，图像质量{quality}。", "{side}{depth}可见{kind}，大小约{size}毫米。{sign}", "未见病灶。"),
        (
            "图像显示{region}，质量{quality}。",
            "图像{side}{depth}探及一处{kind}，直径约{size}毫米。{sign}",
            "未探及病灶。",
        ),
        ("部位：{region}。质量：{quality}。", "所见：{kind}，{side}，{depth}，{size}毫米。", "所见：无病灶。"),
    ),
}
SIGNS = {
    "en": {
        "cyst": "The echoes behind it are enhanced.",
        "oval_solid": "Its margin is smooth.",
        "irregular_solid": "Its margin is irregular and it casts a shadow.",
        "calcification": "It is bright and casts a clean shadow.",
    },
    "zh": {
        "cyst": "后方回声增强。",
        "oval_solid": "边界光滑。",
        "irregular_solid": "边界不规则，后方有声影。",
        "calcification": "呈强回声，后方声影清晰。",
    },
}
DEPTHS = {"en": {"shallow": "shallow", "deep": "deep"}, "zh": {"shallow": "浅部", "deep": "深部"}}
ABSENT = {"en": ("no lesion",), "zh": ("未见病灶", "未探及病灶", "无病灶")}
