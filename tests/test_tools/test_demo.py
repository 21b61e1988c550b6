"""tools/demo.py: what it answers, and where gradio and a browser are installed, the page itself."""
import importlib.util
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_models import CLASSES, save_weights, separated, tiny_model

from convneur_mm.datasets.shapes import single_scene_at

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs('mmdet', 'mmseg', 'mmpretrain')


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('demo_tool', ROOT / 'tools' / 'demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_answer_is_the_prediction_and_the_sheet(tool, tmp_path):
    model = tiny_model('segmentor', save_weights(tiny_model('segmentor'), tmp_path / 'w.pth',
                                                 classes=CLASSES['segmentor']))
    image = np.zeros((64, 80, 3), np.uint8)
    image[..., 0] = 255  # red, in gradio's order
    drawn, sheet = tool.answerer(model, 0.3, 'title')(image)
    assert drawn.shape == image.shape and sheet.shape[1] > 1000 and sheet.dtype == np.uint8
    # The network's picture stands at the top left, in the same colours.
    assert (sheet == [255, 0, 0]).all(-1).sum() > 10_000


def test_what_is_drawn_and_written(tool, monkeypatch):
    """Detections from a score on, in the picture's own colours, and the size of the picture."""
    titles, draw = [], tool.draw_sheet
    monkeypatch.setattr(tool, 'draw_sheet', lambda *args: titles.append(args[-1]) or draw(*args))
    image = np.zeros((64, 80, 3), np.uint8)
    image[..., 0] = 255
    model = separated(tiny_model('detector'))
    (drawn, _), (plain, _) = [tool.answerer(model, score, 'title')(image) for score in (0.0, 1.0)]
    assert (plain == image).all() and (drawn != image).any()
    assert titles == ['title\nuploaded picture, 80 x 64 pixels (width x height)'] * 2


def test_without_gradio_the_command_that_installs_it_is_named(tool, monkeypatch):
    monkeypatch.setattr(tool.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(tool.launch.LaunchError, match=f"{sys.executable} -m pip install 'gradio>=6'"):
        tool.main(['config.py', 'weights.pth'])


@pytest.fixture
def browser():
    """Chromium, if it is there. It is a program of the system's, which pip does not install."""
    pytest.importorskip('gradio', reason="pip install 'gradio>=6'")
    sync_api = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    path = shutil.which('chromium')
    if not path:
        pytest.skip('no chromium on PATH')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


# Address, size and place of the picture and of both answers, once the browser has all of them; the rest are symbols.
PLACES = """() => {
    const found = [...document.querySelectorAll('img')].filter(i => i.complete && i.src.includes('/file='));
    return found.length == 3 && found.map(i => [i.src, i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().left,
                                                i.getBoundingClientRect().right, i.getBoundingClientRect().top]);
}"""


def test_the_page_answers_an_upload_and_asks_no_other_machine(tool, browser, tmp_path, capfd):
    shown = single_scene_at(0, 'val', 3, 96).image
    cv2.imwrite(str(tmp_path / 'photo.png'), cv2.resize(shown, (120, 80)))
    answer = tool.answerer(separated(tiny_model('segmentor')), 0.3, 'title')
    page = tool.build_page(answer, 'tiny')
    page.launch(server_name=tool.HOST, quiet=True, prevent_thread_lock=True)
    expected = answer(cv2.imread(str(tmp_path / 'photo.png'))[..., ::-1])
    hosts = set()
    try:
        for width in (480, 1280):
            tab = browser.new_page(viewport=dict(width=width, height=900))
            tab.on('request', lambda request: hosts.add(request.url.split('/')[2]))
            tab.goto(page.local_url)
            tab.wait_for_selector('input[type=file]', state='attached')
            if width == 480:
                tab.get_by_role('button', name='Predict').click()
                tab.wait_for_selector('text=Upload a picture first.')
            tab.set_input_files('input[type=file]', str(tmp_path / 'photo.png'))
            picture, *others = tab.wait_for_function(PLACES, timeout=120_000).json_value()
            assert picture[1:3] == [120, 80]
            for (source, *_), image in zip(others, expected):
                data = np.frombuffer(tab.request.get(source).body(), np.uint8)
                assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1], image)
            # The prediction beside the picture, the sheet below, and all within the window.
            (_, _, _, left, _, top), (_, _, _, _, _, lowest) = others
            assert left >= picture[4] and abs(top - picture[5]) < 40 and lowest > top
            assert max(place[4] for place in (picture, *others)) <= width
            assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
            tab.close()
    finally:
        page.close()
    assert {host.split(':')[0] for host in hosts if host} == {tool.HOST}
    assert 'Traceback' not in ''.join(capfd.readouterr())
