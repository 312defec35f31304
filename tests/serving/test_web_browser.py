"""The web page in headless Chromium, over the demo model with a strong random prefix."""

import json
import re
import shutil
import socket
import time

import pytest
import torch

from chatglm_ptuning.loading import load_model
from chatglm_ptuning.serving import web
from chatglm_ptuning.serving.opening import DEMO_MODEL, open_engine
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, save_adapter

CHROMIUM = shutil.which("chromium")
QUESTION = "类型#椅子*材质#藤编"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "ads"
    model = load_model(DEMO_MODEL, "float32", "cpu")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=32), "ads")
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=8.0)
    save_adapter(model, directory, "ads")
    row = {"index": 0, "prompt": QUESTION, "reference": "好椅子", "prediction": "椅子"}
    (directory / "predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    scores = {"base": {"rouge-l": 12.5}, "tuned": {"rouge-l": 48.25}}
    (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def urls(adapter):
    engine = open_engine(DEMO_MODEL, {"ads": adapter}, dtype="float32", device="cpu")
    engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # a slow model
    pages = [web.make_page(engine, {"ads": adapter}, DEMO_MODEL, None) for _ in range(2)]
    ports = [free_port() for _ in pages]
    web.launch(pages[0], "127.0.0.1", ports[0])
    web.launch(pages[1], "127.0.0.1", ports[1], web.parse_auth("ann:a:b"))
    yield [f"http://127.0.0.1:{port}" for port in ports]
    for page in pages:
        page.blocks.close()
    engine.close(drain=False)


@pytest.fixture(scope="module")
def url(urls):
    return urls[0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900, "zh-CN"), (390, 844, "en-US")], ids=["desktop", "phone"])
def page(browser, url, request):
    width, height, locale = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
    page = context.new_page()
    page.urls = []
    page.on("request", lambda sent: page.urls.append(sent.url))
    with page.expect_response(lambda response: "/run/predict" in response.url):
        page.goto(url)  # and it tells its language
    page.wait_for_selector("#box textarea")
    page.get_by_role("tab", name="对话" if locale == "zh-CN" else "Chat").wait_for()
    yield page
    context.close()


def send(page, text):
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")
    page.locator("#chat-left [data-testid=user]").wait_for()  # shown together with the stop button


def answers(page, side="left"):
    return page.locator(f"#chat-{side} [data-testid=bot]").all_inner_texts()


def wait_until_done(page):
    page.locator("#box .submit-button").wait_for()


def choose(page, dropdown, place):
    page.click(f"#{dropdown} input")
    page.get_by_role("option").nth(place).click()


def test_no_request_leaves_the_machine(page, url):
    send(page, QUESTION)
    wait_until_done(page)
    assert len(page.urls) > 10
    assert [sent for sent in page.urls if not sent.startswith((url, "data:", "blob:"))] == []


def test_page_fits_its_width(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_answer_streams_in(page):
    send(page, QUESTION)
    seen = set()
    while page.locator("#box .stop-button").count():
        seen.update(answers(page))
        page.wait_for_timeout(20)
    final = answers(page)[-1]
    assert len(seen - {""}) >= 3
    assert all(final.startswith(text) for text in seen)
    assert page.locator("#chat-left [data-testid=user]").inner_text().strip() == QUESTION


def test_stop_ends_the_answer(page):
    send(page, QUESTION)
    page.locator("#chat-left [data-testid=bot]").wait_for()
    page.locator("#box .stop-button").click()
    wait_until_done(page)
    stopped = answers(page)
    page.wait_for_timeout(400)
    assert answers(page) == stopped
    page.locator("#status-left").get_by_text(re.compile("(已停止|stopped)$")).wait_for()


def test_switched_adapter_answers_otherwise(page):
    send(page, QUESTION)
    wait_until_done(page)
    tuned = answers(page)[-1]
    choose(page, "left", -1)
    page.locator("#chat-left .message-buttons-bot, #chat-left .message-buttons-left").locator(
        "button"
    ).nth(1).click()
    page.locator("#box .stop-button").wait_for()
    wait_until_done(page)
    assert len(answers(page)) == 1
    assert answers(page)[-1] != tuned


def test_side_by_side_shows_both(page):
    choose(page, "right", -1)
    send(page, QUESTION)
    page.locator("#chat-right [data-testid=bot]").wait_for()
    wait_until_done(page)
    left, right = answers(page), answers(page, "right")
    assert len(left) == len(right) == 1
    assert left != right


def test_run_tab_shows_scores(page):
    page.get_by_role("tab").nth(1).click()
    assert page.locator("#run .scores").inner_text().split()[-3:] == ["12.50", "48.25", "+35.75"]
    border = "row => getComputedStyle(row).borderTopWidth"  # gradio's own style draws one
    assert page.locator("#run .scores tr").first.evaluate(border) == "0px"


def test_html_of_a_message_is_text(page):
    send(page, "<img src=x onerror=alert(1)><b>粗</b>")
    wait_until_done(page)
    user = page.locator("#chat-left [data-testid=user]")
    assert user.inner_text().strip() == "<img src=x onerror=alert(1)><b>粗</b>"
    assert user.locator("img, b").count() == 0


def press(page, name):
    buttons = {
        "clear": page.locator("#chat-left button").first,
        "undo": page.locator("#chat-left button").last,
        "edit": page.locator("#chat-left .message-buttons-right button").last,
        "submit": page.locator("#chat-left .message-buttons-right button").first,
    }
    buttons[name].click()


def test_undo_takes_a_turn_back_on_both_sides(page):
    choose(page, "right", -1)
    send(page, QUESTION)
    wait_until_done(page)
    press(page, "undo")
    page.wait_for_function(
        "text => document.querySelector('#box textarea').value === text", arg=QUESTION
    )
    assert page.locator("[data-testid=user], [data-testid=bot]").count() == 0


def test_clear_takes_all_back(page):
    send(page, QUESTION)
    wait_until_done(page)
    press(page, "clear")
    page.locator("#chat-left [data-testid=user]").wait_for(state="detached")
    assert answers(page) == []
    assert page.locator("#status-left").inner_text().strip() == ""


def test_edited_message_is_answered_again(page):
    send(page, QUESTION)
    wait_until_done(page)
    press(page, "edit")
    field = page.locator("#chat-left textarea")
    assert field.input_value() == QUESTION  # without the escapes that keep Markdown off it
    field.fill("a\\*b*c")
    press(page, "submit")
    page.locator("#box .stop-button").wait_for()
    wait_until_done(page)
    assert page.locator("#chat-left [data-testid=user]").inner_text().strip() == "a\\*b*c"
    assert len(answers(page)) == 1


def test_raw_prompt_has_the_control_tokens(page):
    page.fill("#box textarea", QUESTION)
    page.click("#prompt button")
    page.click("#show-prompt")
    page.wait_for_function("document.querySelector('#raw-prompt textarea').value !== ''")
    assert page.input_value("#raw-prompt textarea") == f"{QUESTION}[gMASK]<sop>"


def test_switched_language_keeps_the_conversation(page):
    send(page, QUESTION)
    wait_until_done(page)
    before = answers(page)
    is_chinese = page.get_by_role("tab", name="对话").count() == 1
    page.locator("#language").get_by_text("English" if is_chinese else "中文").click()
    page.get_by_role("tab", name="Chat" if is_chinese else "对话").wait_for()
    assert answers(page) == before
    page.get_by_role("tab").nth(1).click()
    page.locator("#run").get_by_text("Scores" if is_chinese else "成绩").wait_for()


def test_too_long_message_is_refused_and_kept(page):
    text = "椅子" * 600
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")
    page.locator("#notice").get_by_text("511").wait_for()
    assert page.input_value("#box textarea") == text
    send(page, QUESTION)
    page.locator("#notice").wait_for(state="hidden")


def test_visitors_are_asked_for_the_password(browser, urls):
    page = browser.new_context(locale="en-US").new_page()
    page.goto(urls[1])
    for password, shown in (("b", "Incorrect Credentials"), ("a:b", "Answered by")):
        page.locator("input").nth(0).fill("ann")
        page.locator("input").nth(1).fill(password)
        page.get_by_role("button", name="Login").click()
        page.get_by_text(re.compile(shown, re.IGNORECASE)).first.wait_for()
        assert page.locator("#box").count() == (password == "a:b")
    page.context.close()
