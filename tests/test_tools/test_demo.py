"""tools/demo.py: what it answers, and where gradio and a browser are installed, the page itself."""
import importlib.util
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_models import CLASSES, save_weights, tiny_model

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


def test_without_gradio_the_command_that_installs_it_is_named(tool, monkeypatch):
    monkeypatch.setattr(tool.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(tool.launch.LaunchError, match=f"{sys.executable} -m pip install 'gradio>=6'"):
        tool.main(['config.py', 'weights.pth'])


def test_the_page_answers_an_upload_and_asks_no_other_machine(tool, tmp_path):
    pytest.importorskip('gradio', reason="pip install 'gradio>=6'")
    sync_api = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    browser_path = shutil.which('chromium')
    if not browser_path:
        pytest.skip('no chromium on PATH')
    cv2.imwrite(str(tmp_path / 'photo.png'), np.full((64, 80, 3), 90, np.uint8))
    page = tool.build_page(tool.answerer(tiny_model('segmentor'), 0.3, 'title'), 'tiny')
    page.launch(server_name=tool.HOST, quiet=True, prevent_thread_lock=True)
    hosts, big = set(), '[...document.querySelectorAll("img")].some(i => i.complete && i.naturalWidth > 1000)'
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=['--no-sandbox'])
            tab = browser.new_page(viewport=dict(width=480, height=900))
            tab.on('request', lambda request: hosts.add(request.url.split('/')[2]))
            tab.goto(page.local_url)
            tab.wait_for_selector('input[type=file]', state='attached')
            tab.set_input_files('input[type=file]', str(tmp_path / 'photo.png'))
            tab.wait_for_function(big, timeout=120_000)
            assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
            browser.close()
    finally:
        page.close()
    assert {host.split(':')[0] for host in hosts if host} == {tool.HOST}
