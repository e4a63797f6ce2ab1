"""The playground as people use it: a real server, Debian's chromium, and Gradio's client."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import DATA, REPOSITORY
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect, sync_playwright

from ptv2 import build_model, load_examples

SCREENSHOTS = REPOSITORY / "build" / "screenshots"
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync"]
SHIPPED = ["p-tuning-v2", "fine-tuning", "head-only"]
TEXT = "The harbour was dug by two hundred men from the islands. They were paid in herring and copper."
QUESTION = "What did the men get for their work?"
NASTY = (
    "السفينة 🚢👩‍👩‍👧 <script>window.hacked = 1</script> <img src=x onerror='window.hacked = 2'> ${window.hacked = 3} {{value}} "
    "`x` &amp; \x01\x1b[31m עברית\u202eabc\u202c e\u0301. They were paid in <b>herring 🐟</b> & copper. </textarea></div>"
)


def install_chromium() -> str:
    """The path of Debian's chromium, installed where it is missing and may be."""
    if not shutil.which("chromium"):
        sudo = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
        for words in (["update"], ["install", "--yes", "chromium"]):
            subprocess.run([*sudo, "apt-get", *words], capture_output=True, check=False)
    found = shutil.which("chromium")
    if not found:
        pytest.fail("The playground's tests need chromium, which could not be installed here: run `apt-get install chromium` first.")
    return found


class Server:
    """`ptv2 demo` on a free port, with a folder of runs."""

    def __init__(self, folder: Path):
        self.runs, self.home = folder / "runs", folder / "tmp"
        self.runs.mkdir()
        self.home.mkdir()
        environment = {**os.environ, "TMPDIR": str(self.home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ptv2", "demo", "--runs", str(self.runs)]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        assert "http://127.0.0.1:" in line, self.said()
        self.url = re.search(r"http://\S+", line).group()
        with urllib.request.urlopen(self.url) as page:
            page.read()
        # Seconds of processor time until the first page, which a machine busy with other things does not stretch.
        spent = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        self.first_page_seconds = sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")

    def said(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8")

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("playground"))
    yield server
    assert server.alive(), server.said()
    server.stop()
    assert "Traceback" not in server.said(), server.said()
    assert not list(server.home.glob("ptv2-playground-*"))  # uploads and reports went with the process
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=install_chromium(), args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Opens the page as one more person; afterwards nothing was asked of other machines, and nothing was run or went wrong."""
    contexts, wrong = [], []

    def watch(page: Page) -> None:
        page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))

    def open_page(query: str = "", width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        watch(page)
        page.goto(server.url + query)
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible(timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        assert all(page.evaluate("window.hacked === undefined") for page in context.pages)
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


def ask(page: Page, question: str | None = None, text: str | None = None) -> None:
    """Fill in, ask, and wait for the answers."""
    if text is not None:
        page.locator("#text textarea").fill(text)
    if question is not None:
        page.locator("#question textarea").fill(question)
    page.evaluate("document.querySelector('#answers .cards')?.remove()")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#answers .card").first.wait_for()


def upload(page: Page, file: Path) -> None:
    """Chooses the file, and waits until the page lists it; what shows the upload's progress may stay behind, hidden."""
    page.get_by_role("tab", name="Score a file").click()
    page.locator("#file input[type=file]").set_input_files(file)
    page.locator("#file").get_by_text(file.stem).filter(visible=True).first.wait_for()


def problem(page: Page, place: str) -> str:
    """The sentence that a person is shown."""
    alert = page.locator(f"{place} [role=alert]").first
    alert.wait_for()
    return alert.inner_text()


def test_the_first_page_does_not_wait_for_torch(server):
    assert server.first_page_seconds < 5


def test_ask_and_compare(open_page, client):
    page = open_page()
    ask(page, QUESTION, TEXT)
    cards = page.locator("#answers .card")
    assert cards.count() == 3
    assert [title.split()[0] for title in cards.locator("h2").all_inner_texts()] == ["P-tuning", "Full", "Head"]
    told = client.predict(QUESTION, TEXT, None, api_name="/compare")
    for i, name in enumerate(SHIPPED):
        assert cards.nth(i).locator("mark").inner_text() == told[name]["answer"] == TEXT[told[name]["start"] : told[name]["end"]]
        assert f"{told[name]['trained']:,} trained numbers" in cards.nth(i).inner_text()
        cards.nth(i).locator("summary").click()
        assert cards.nth(i).locator("tbody tr").count() == len(told[name]["n_best"])
    assert "herring and copper" in told["fine-tuning"]["answer"] and told["p-tuning-v2"]["trained"] == 148_226
    badges = cards.locator(".badge").all_inner_texts()
    assert len(set(badges)) == len({told[name]["answer"].lower() for name in SHIPPED})
    verdict = page.locator("#answers .verdict").inner_text()
    assert ("All 3 agree" in verdict) == (len(set(badges)) == 1)


def test_enter_asks_and_the_address_is_a_link_to_it(open_page):
    page = open_page()
    page.locator("#text textarea").fill(TEXT)
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#question textarea").press("Enter")
    page.wait_for_url("**question=What**")
    answers = page.locator("#answers .answer").all_inner_texts()
    linked = open_page(page.url[page.url.index("?") :])
    linked.locator("#answers .card").first.wait_for()
    assert linked.locator("#answers .answer").all_inner_texts() == answers
    assert linked.locator("#text textarea").input_value() == TEXT
    only_text = open_page("?" + urlencode({"context": "A short text."}))
    expect(only_text.locator("#text textarea")).to_have_value("A short text.")


def test_examples_show_what_is_right(open_page):
    page = open_page()
    examples = load_examples("embedded", "dev")
    page.get_by_role("button", name="Next example").click()
    expect(page.locator("#question textarea")).to_have_value(examples[1].question)
    ask(page)
    verdict = page.locator("#answers .verdict").inner_text()
    assert all(span.text in verdict for span in examples[1].answers)
    assert page.locator("#answers .right, #answers .wrong").count() == 3
    unanswerable = next(example for example in examples if example.is_impossible)
    choose = page.get_by_label("Examples")
    choose.fill(unanswerable.question)
    choose.press("Enter")
    expect(page.locator("#question textarea")).to_have_value(unanswerable.question)
    ask(page)
    assert "the text does not say" in page.locator("#answers .verdict").inner_text()


def test_a_text_of_markup_emoji_and_right_to_left_is_shown_as_it_is(open_page, client):
    page = open_page()
    ask(page, "What were they paid in? <script>window.hacked = 4</script>", NASTY)
    told = client.predict("What were they paid in? <script>window.hacked = 4</script>", NASTY, None, api_name="/compare")
    shown = NASTY.replace("\x01", "␁").replace("\x1b", "␛")
    for i, name in enumerate(SHIPPED):
        card = page.locator("#answers .card").nth(i)
        assert told[name]["answer"] == NASTY[told[name]["start"] : told[name]["end"]]
        assert card.locator("mark").text_content() == shown[told[name]["start"] : told[name]["end"]]
        excerpt = card.locator(".excerpt").text_content().removeprefix("… ").removesuffix(" …")
        assert excerpt in shown and card.locator("mark").text_content() in excerpt
        assert card.locator(".excerpt *:not(mark)").count() == 0
    page.get_by_role("tab", name="Look inside").click()
    page.locator(".inside img").wait_for()
    start = page.locator(".shaded.start")
    assert start.text_content() in shown and start.locator("*:not(span)").count() == 0


def test_what_nobody_can_answer_gets_one_sentence(open_page):
    page = open_page()
    page.locator("#question textarea").fill("  ")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert problem(page, "#answers") == "The question is empty: write or paste one."
    page.locator("#question textarea").fill("Who?")
    page.locator("#text textarea").fill("a " * 500_000)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answers [role=alert]")).to_contain_text("The text has 1,000,000 characters; the limit here is 20,000")
    page.locator("#text textarea").fill("\x00 \x07")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#answers .card").first.wait_for()  # control characters alone: no word to point at
    assert page.locator("#answers mark").count() == 0
    for box in page.locator("#methods input").all():
        box.uncheck()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answers [role=alert]")).to_contain_text("No method is chosen")


def test_look_inside(open_page, client):
    page = open_page()
    ask(page, QUESTION, TEXT)
    page.get_by_role("tab", name="Look inside").click()
    page.locator(".inside img").wait_for()
    assert page.locator(".inside img").evaluate("image => image.naturalWidth") > 500
    page.locator(".inside summary").click()
    cells = [int(cell) for cell in page.locator(".inside tbody td").all_inner_texts()]
    assert len(cells) == 6 * 12 and 0 <= min(cells) < max(cells) <= 100
    told = client.predict(QUESTION, TEXT, "p-tuning-v2", api_name="/answer")
    best = page.locator(".shaded.start + .top bdi").first.inner_text()
    assert told["answer"].startswith(best) or best in TEXT
    expect(page.locator(".shaded.end span").first).to_have_attribute("title", re.compile(r"^\d+\.\d %$"))


def test_score_a_file(open_page, client, tmp_path):
    page = open_page()
    content = json.loads((DATA / "squad_v2.json").read_text(encoding="utf-8"))
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = "<script>window.hacked = 5</script> When did people excavate the port?"
    file = tmp_path / "..;<b>my questions.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    upload(page, file)
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("#report .scores").wait_for()
    assert "<script>window.hacked = 5</script>" in page.locator(".disagreements").inner_text()
    told = client.predict(handle_file(file), SHIPPED, 100, api_name="/evaluate")
    rows = page.locator("#report .scores tbody tr").all_inner_texts()
    assert len(rows) == 3 and told["scored"] == 5
    for row, name in zip(rows, SHIPPED, strict=True):
        f1 = told["methods"][name]["f1"]
        assert f"{f1['value']:.1f} [{f1['low']:.1f}, {f1['high']:.1f}]" in row
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download as JSON").click()
    assert json.loads(Path(saved.value.path()).read_text(encoding="utf-8")) == told
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download as CSV").click()
    table = Path(saved.value.path()).read_text(encoding="utf-8-sig").splitlines()
    assert table[0] == "id,question,accepted," + ",".join(f"{name} {what}" for name in SHIPPED for what in ("answer", "F1"))


def many_questions(to: Path, count: int) -> Path:
    """A SQuAD file with the same question again and again."""
    qas = [
        {"id": str(i), "question": QUESTION, "answers": [{"text": "herring", "answer_start": TEXT.index("herring")}]} for i in range(count)
    ]
    to.write_text(json.dumps({"data": [{"title": "Harbour", "paragraphs": [{"context": TEXT, "qas": qas}]}]}))
    return to


def test_scoring_shows_progress_and_stops(open_page, client, tmp_path):
    page = open_page()
    upload(page, many_questions(tmp_path / "many.json", 900))
    page.locator("#limit input[type=number]").fill("900")
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("#report progress").wait_for()
    expect(page.locator("#report .progress")).to_contain_text(re.compile(r"\b(8|16|24|32|40) of 900 questions"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#report")).to_contain_text("Stopped")
    page.wait_for_timeout(500)
    expect(page.locator("#report")).to_contain_text("Stopped")
    # The place in the queue is free again, and so it is when someone closes the page in the middle.
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("#report progress").wait_for()
    page.context.pages[0].close()
    told = client.submit(handle_file(DATA / "squad_v1.json"), ["head-only"], 100, api_name="/evaluate").result(timeout=60)
    assert told["scored"] == told["in_file"] > 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.json", b'{"data": [', "The file is not valid JSON"),
        ("other.json", b'{"rows": []}', 'The file: the field "data" is missing'),
        ("binary.json", bytes(range(256)), "The file is not UTF-8 text"),
        ("packed.json", b"\x1f\x8b\x08", "The file is compressed: unpack it first"),
        ("empty.json", b'{"data": []}', "The file holds no questions"),
        ("deep.json", b"[" * 100_000, "The file is not valid JSON"),
    ],
)
def test_a_broken_upload_gets_one_sentence(open_page, server, tmp_path, name, content, said):
    page = open_page()
    (tmp_path / name).write_bytes(content)
    upload(page, tmp_path / name)
    page.get_by_role("button", name="Score", exact=True).click()
    sentence = problem(page, "#report")
    assert sentence.startswith(said) and str(server.home) not in sentence


def test_limits_of_a_file_are_enforced(open_page, client, tmp_path):
    page = open_page()
    (tmp_path / "huge.json").write_bytes(b" " * 5_300_000)
    page.get_by_role("tab", name="Score a file").click()
    assert "at most 5 MB and 20,000 characters a text; up to 1,000" in page.locator("main, body").first.inner_text()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "huge.json")
    page.get_by_text(re.compile(r"exceed the maximum allowed size of 5\D")).first.wait_for()
    page.get_by_role("button", name="Score", exact=True).click()
    assert "no file yet" in problem(page, "#report")
    with pytest.raises(AppError, match="must be 1 to 1,000"):
        client.predict(handle_file(DATA / "squad_v1.json"), None, 1001, api_name="/evaluate")
    told = client.predict(handle_file(many_questions(tmp_path / "many.json", 40)), ["head-only"], 3, api_name="/evaluate")
    assert (told["scored"], told["in_file"]) == (3, 40)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_fits_and_is_photographed(open_page, width, scheme):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = open_page(width=width, scheme=scheme)

    def photograph(name: str) -> None:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width  # nothing to scroll sideways for
        page.mouse.move(0, 0)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)

    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    ask(page)
    photograph("ask")
    page.get_by_role("tab", name="Look inside").click()
    page.locator(".inside img").wait_for()
    photograph("inside")
    upload(page, DATA / "squad_v2.json")
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("#report .scores").wait_for()
    photograph("score")


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    page.locator("#intro").click()
    reached = []
    while "ask" not in reached and len(reached) < 40:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"methods", "example", "next", "text", "question", "ask"} <= set(reached)
    page.keyboard.press("Enter")
    page.locator("#answers .card").first.wait_for()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # where the keyboard is can be seen
    page.get_by_role("tab", name="Look inside").focus()
    page.keyboard.press("Enter")
    page.locator(".inside img").wait_for()


def test_everything_that_takes_input_has_a_name(open_page):
    page = open_page()
    ask(page)
    nameless = """() => [...document.querySelectorAll('button, input, textarea, select, [role=tab], summary, meter, progress')]
        .filter(node => node.checkVisibility() && node.type !== 'file')
        .filter(node => !(node.ariaLabel || node.innerText?.trim() || node.title || node.labels?.[0]?.innerText?.trim()
            || document.getElementById(node.getAttribute('aria-labelledby'))))
        .map(node => node.outerHTML.slice(0, 200))"""
    for tab in ("Ask", "Look inside", "Score a file"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate(nameless) == []
    assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"
    assert page.locator("[role=status]").count() >= 1  # answers are announced


def save_run(server: Server, name: str, tiny_bert: Path) -> Path:
    """A run, as far as the page knows it, of an untrained head on a tiny backbone."""
    path = server.runs / name
    build_model("head-only", str(tiny_bert)).save_pretrained(path, windows={"max_length": 128, "stride": 32})
    return path


def test_runs_come_and_go_while_the_page_is_open(server, open_page, client, tiny_bert):
    page = open_page()
    first = save_run(server, "<b>first & one", tiny_bert)
    boxes = page.locator("#methods label")
    expect(boxes).to_have_count(4, timeout=15_000)
    time.sleep(0.01)
    second = save_run(server, "second", tiny_bert)
    expect(boxes).to_have_count(5, timeout=15_000)
    assert boxes.all_inner_texts()[3:] == ["Head only (runs/second)", "Head only (runs/<b>first & one)"]  # newest first
    expect(page.locator("#methods input:checked")).to_have_count(5)
    ask(page, QUESTION, TEXT)
    assert page.locator("#answers .card").count() == page.locator("#answers .answer").count() == 5
    assert "runs/second" in client.predict(QUESTION, TEXT, ["runs/second"], api_name="/compare")
    told = client.predict(handle_file(DATA / "squad_v1.json"), ["runs/second", "head-only"], 2, api_name="/evaluate")
    assert list(told["methods"]) == ["runs/second", "head-only"]
    # One is damaged, the other goes in the very moment in which it is asked.
    described = json.loads((second / "ptv2.json").read_text())
    described["backbone"]["sha256"] = "f" * 64
    (second / "ptv2.json").write_text(json.dumps(described))
    ask(page, QUESTION, TEXT + " ")
    assert "runs/second was trained on a backbone with sha256 ffffffffffff" in problem(page, "#answers .card")
    assert page.locator("#answers .answer").count() == 4
    shutil.rmtree(first)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answers > * [role=alert]").first).to_contain_text(re.compile("is not there|trained on a backbone"))
    shutil.rmtree(second)
    expect(boxes).to_have_count(3, timeout=15_000)
    ask(page, QUESTION, TEXT)
    assert page.locator("#answers .answer").count() == 3


def test_two_people_are_told_their_own(open_page):
    pages = [open_page(), open_page()]
    for page, fish in zip(pages, ["herring", "salmon"], strict=True):
        page.locator("#text textarea").fill(TEXT.replace("herring", fish))
        page.locator("#question textarea").fill(QUESTION)
    for page in pages:
        page.get_by_role("button", name="Ask", exact=True).click()
    for page, fish in zip(pages, ["herring", "salmon"], strict=True):
        page.locator("#answers .card").first.wait_for()
        assert f"{fish} and copper" in page.locator("#answers mark").nth(1).inner_text()


def test_the_api_is_documented(client):
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {name: [one["parameter_name"] for one in endpoint["parameters"]] for name, endpoint in described.items()}
    assert parameters == {
        "/answer": ["question", "text", "method"],
        "/compare": ["question", "text", "methods"],
        "/evaluate": ["file", "methods", "limit"],
    }
    for endpoint in described.values():
        assert endpoint["description"].endswith(".")


def test_the_api_answers_in_characters_of_the_text(client):
    text = "😀 e\u0301 " + TEXT
    told = client.predict(QUESTION, text, api_name="/answer")
    assert told["answer"] == text[told["start"] : told["end"]] and not told["no_answer"]
    assert told["n_best"][0]["text"] == told["answer"] and 0 < told["score"] <= 1
    assert told["stored_bytes"] < 1e6 and told["seconds"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("", TEXT, "p-tuning-v2"), "The question is empty"),
        (("Who?", "\n \t", "p-tuning-v2"), "The text is empty"),
        (("Who? " * 300, TEXT, "p-tuning-v2"), "The question has 1,500 characters; the limit here is 1,000"),
        (("Who?", TEXT * 600, "p-tuning-v2"), "characters; the limit here is 20,000"),
        (("Who?", TEXT, "../../../etc"), r"\.\./\.\./\.\./etc is not there \(any more\): choose among p-tuning-v2, fine-tuning, head-only"),
        (("Who?", TEXT, {"a": 1}), "The methods must be a list of names"),
        ((5, TEXT, "p-tuning-v2"), "The question is empty"),
    ],
)
def test_the_api_refuses_in_one_sentence(client, given, said):
    with pytest.raises(AppError, match=said):
        client.predict(*given, api_name="/answer")


def call(server: Server, name: str, data: list) -> str:
    """The API without Gradio's client, which would upload files and refuse broken text by itself."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}gradio_api/call/{name}", json.dumps({"data": data}).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{server.url}gradio_api/call/{name}/{event}") as answer:
        return answer.read().decode()


def test_half_a_character_is_refused(server):
    assert "is not Unicode text at character 0" in call(server, "answer", ["Who?", "\ud800 were paid", "p-tuning-v2"])


def test_many_at_once_are_all_answered_and_beyond_the_queue_told_so(client):
    texts = [f"Person {i} counted {i + 100} herrings." for i in range(80)]
    jobs = [client.submit("How many herrings?", text, "head-only", api_name="/answer") for text in texts]
    answered, refused = 0, []
    for job, text in zip(jobs, texts, strict=True):
        try:
            told = job.result(timeout=60)
            assert told["answer"] and text[told["start"] : told["end"]] == told["answer"]
            answered += 1
        except AppError as error:
            refused.append(str(error))
    assert answered >= 40 and all("queue is full" in sentence.lower() for sentence in refused), refused
    with ThreadPoolExecutor(20) as people:  # each waits for an answer before asking again
        told = list(people.map(lambda text: client.predict("How many herrings?", text, "head-only", api_name="/answer"), texts[:40]))
    assert all(text[one["start"] : one["end"]] == one["answer"] for text, one in zip(texts, told, strict=False))


def test_nothing_else_is_served(server):
    for path in ("gradio_api/mcp", "gradio_api/mcp/sse", "monitoring", "gradio_api/runs", "gradio_api/file=/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + path)
        assert refused.value.code in (403, 404)
    listening = Path(f"/proc/{server.process.pid}/net/tcp").read_text()
    port = f"{int(server.url.rstrip('/').rpartition(':')[2]):04X}"
    assert {line.split()[1] for line in listening.splitlines() if line.split()[1].endswith(f":{port}") and line.split()[3] == "0A"} == {
        f"0100007F:{port}"  # 127.0.0.1
    }
    with urllib.request.urlopen(f"{server.url}config") as answer:
        config = json.load(answer)
    assert config["analytics_enabled"] is False and not config.get("share") and config["mcp_server"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runs", "nowhere"], "nowhere is not a directory of runs"),
        (["--port", "99999"], "The port is 99999; it must be 1 to 65535"),
        (["--host", "203.0.113.9"], "cannot listen on 203.0.113.9"),
    ],
)
def test_a_bad_start_ends_with_status_2_and_one_sentence(words, said):
    ended = subprocess.run([sys.executable, "-m", "ptv2", "demo", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and not ended.stdout
    assert re.fullmatch(rf"ptv2: .*{re.escape(said)}.*\n", ended.stderr)
