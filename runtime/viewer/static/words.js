// Every word that the page says itself, in both languages; what the server says is shown as it is.

const WORDS = {
  freeze: ["Freeze", "冻结"],
  unfreeze: ["Go live", "恢复实时"],
  otherLanguage: ["中文", "English"],
  picture: ["Ultrasound picture", "超声图像"],
  timeline: ["Hints of the last three minutes", "最近三分钟的提示"],
  hints: ["Hints", "提示"],
  answers: ["Answers", "回答"],
  noAnswers: ["Questions and answers appear here.", "问题与回答显示在此处。"],
  askSomething: ["Ask a question…", "请提问…"],
  ask: ["Ask", "提问"],
  cancel: ["Cancel", "取消"],
  report: ["Report", "报告"],
  reportEn: ["Report in English", "英文报告"],
  reportZh: ["Report in Chinese", "中文报告"],
  shortcuts: ["Keyboard", "键盘快捷键"],
  focusQuestion: ["Write a question", "输入问题"],
  sendQuestion: ["Ask it", "提交问题"],
  cancelAnswer: ["Cancel the answer, leave the box", "取消回答，离开输入框"],
  toggleFreeze: ["Freeze, go live again", "冻结／恢复实时"],
  makeReport: ["Report in this language", "生成中文报告"],
  switchLanguage: ["English, Chinese", "中文／英文"],
  showShortcuts: ["Show this list", "显示此列表"],
  close: ["Close", "关闭"],
  notKnownYet: ["No server yet: nothing here is a medical statement.", "尚无服务器：此处内容均非医疗结论。"],
  frame: ["frame", "帧"],
  model: ["model", "模型"],
  noPicture: ["no picture yet", "尚无图像"],
  pictureAge: ["this picture is {0} old", "此图像为 {0} 前"],
  live: ["LIVE", "实时"],
  waiting: ["WAITING FOR THE SOURCE", "等待信号源"],
  stalled: ["SOURCE STALLED", "信号源停滞"],
  lost: ["SOURCE LOST", "信号源丢失"],
  ended: ["SOURCE ENDED", "信号源已结束"],
  connecting: ["CONNECTING", "正在连接"],
  oldPicture: ["OLD PICTURE", "图像已过时"],
  frozen: ["FROZEN", "已冻结"],
  serverSilent: ["NO CONNECTION TO THE SERVER", "与服务器无连接"],
  viewerSilent: ["THE VIEWER HAS STOPPED", "查看程序已停止"],
  notLive: ["the picture is not live", "图像非实时"],
  nothingYet: ["nothing yet", "尚无"],
  expired: ["the last one was {0} ago", "上一条在 {0} 前"],
  oneOf: ["{1} ({0} coverage)", "{1}（覆盖率 {0}）"],
  or: [" or ", "或"],
  aboutFrame: ["frame {0}, {1} old", "帧 {0}，{1} 前"],
  past: ["about an earlier picture", "关于先前的图像"],
  took: ["answered in {0}", "用时 {0}"],
  cutShort: ["cut short: {0}", "未完成：{0}"],
  refused: ["refused", "已拒绝"],
  retry: ["retry in {0}", "{0} 后重试"],
  broken: ["the answer broke off: ask again", "回答中断：请重新提问"],
  received: ["in {0}", "接收 {0}"],
  dropped: ["dropped {0}", "丢弃 {0}"],
  gated: ["gated {0}", "拦截 {0}"],
  failed: ["failed {0}", "失败 {0}"],
  latency: ["capture to hint p50 {0} p95 {1} p99 {2}", "采集至提示 p50 {0} p95 {1} p99 {2}"],
  shown: ["shown {0}/s", "显示 {0} 帧/秒"],
  now: ["now", "现在"],
  minutesAgo: ["−{0} min", "−{0} 分"],
  "hint.region": ["Region", "部位"],
  "hint.quality": ["Quality", "质量"],
  "hint.finding": ["Lesion", "病灶"],
  "hint.kind": ["Kind", "类型"],
  "hint.side": ["Side", "侧别"],
  "finish.length": ["too long", "过长"],
  "finish.deadline": ["out of time", "超时"],
  "finish.cancelled": ["cancelled", "已取消"],
  "reason.not asked": ["not asked about this picture", "此图像不询问"],
  "reason.low confidence": ["low confidence", "置信度低"],
  "reason.unseen kind of image": ["unseen kind of image", "未见过的图像类型"],
  "reason.poor frame": ["poor frame", "图像不佳"],
  "reason.stale frame": ["stale frame", "图像过时"],
  "reason.frozen": ["frozen", "已冻结"],
  "reason.black": ["black", "黑屏"],
  "reason.in air": ["probe in air", "探头未接触"],
  "reason.poor contact": ["poor contact", "接触不良"],
};

const LANGUAGES = ["en", "zh"];
let language = LANGUAGES.find((one) => navigator.language.startsWith(one)) ?? "en";

export function current() {
  return language;
}

export function say(key, ...values) {
  const text = WORDS[key][LANGUAGES.indexOf(language)];
  return values.reduce((said, value, index) => said.replace(`{${index}}`, () => value), text);
}

// What the server named: in our words where we have them, else as it is.
export function name(kind, key) {
  return Object.hasOwn(WORDS, `${kind}.${key}`) ? say(`${kind}.${key}`) : key;
}

export function reason(text) {
  const [head, ...rest] = text.split(": ");
  return [head, ...rest].map((part) => name("reason", part)).join(language === "zh" ? "：" : ": ");
}

export function seconds(ms) {
  if (ms < 99_500) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.round(ms / 60_000)} min`;
}

export function switchLanguage() {
  language = LANGUAGES[1 - LANGUAGES.indexOf(language)];
  translate();
}

export function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = say(element.dataset.label);
  for (const element of document.querySelectorAll("[data-title]")) {
    element.title = element.ariaLabel = say(element.dataset.title);
  }
  for (const element of document.querySelectorAll("[data-empty]")) element.dataset.says = say(element.dataset.empty);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = say(element.dataset.hint);
}
