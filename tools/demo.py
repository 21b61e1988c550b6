#!/usr/bin/env python
"""Open a page in the browser that predicts uploaded pictures, and shows what the gates and memories do with them.

    tools/demo.py configs/semantic_fpn_convneur_m1_shapes.py CHECKPOINT

The page is only served to this machine and contacts no other. It needs gradio: pip install 'gradio>=6'.
"""
import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if __name__ == '__main__':
    from _environment import prepare
    prepare()

import numpy as np
from mmengine.model import BaseModel

from convneur_mm.apis import init_model
from convneur_mm.apis.results import Painter
from convneur_mm.engine import launch
from convneur_mm.visualization import GateRecorder
from convneur_mm.visualization.sheet import draw_sheet
from convneur_mm.visualization.view import look

if TYPE_CHECKING:
    import gradio

HOST = '127.0.0.1'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_model_arguments(parser)
    parser.add_argument('--port', type=int, metavar='N',
                        help='port of the page (default: the first free one from 7860 on)')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='SCORE',
                        help='minimum score of detections to draw (default: %(default)s)')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if importlib.util.find_spec('gradio') is None:
        raise launch.LaunchError(f"the page needs gradio, which is not installed here: {sys.executable} -m pip install "
                                 "'gradio>=6'")
    # This comes before gradio is imported, which would contact its servers and offer to share the page.
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_OFFLINE='1')
    model = init_model(args.config, args.checkpoint, args.device, args.cfg_options, args.allow_pickle)
    try:
        GateRecorder(model)
    except ValueError as error:
        raise launch.LaunchError(f'{args.config}: {error}') from None
    page = build_page(answerer(model, args.score_thr, f'{args.config}\n{args.checkpoint}'),
                      os.path.basename(args.config))
    try:
        page.launch(server_name=HOST, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:  # no port is free
        raise launch.LaunchError(f'--port {args.port}: {str(error).splitlines()[0]}') from None
    print(f'the page is at {page.local_url} until Ctrl-C', flush=True)
    page.block_thread()


def answerer(model: BaseModel, score_thr: float, title: str) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a function from an uploaded picture (H, W, 3), RGB, uint8, to pictures of its prediction and gate
    sheet."""
    painter = Painter(model, score_thr)

    def answer(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        view = look(model, np.ascontiguousarray(image[..., ::-1]))
        figure = draw_sheet(view.picture, view.parts, f'{title}\nuploaded picture, {image.shape[1]} x '
                            f'{image.shape[0]} pixels (width x height)')
        figure.canvas.draw()
        drawn = painter(view.prediction.picture, view.prediction.sample)
        return drawn[..., ::-1], np.asarray(figure.canvas.buffer_rgba())[..., :3]

    return answer


def build_page(answer: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], name: str) -> 'gradio.Blocks':
    """Build the page: a picture to upload, its prediction beside it, and the gate sheet below."""
    import gradio as gr
    shown = dict(format='png', interactive=False, buttons=['download', 'fullscreen'])  # without the share button

    def reply(image: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if image is None:
            raise gr.Error('Upload a picture first.', print_exception=False)
        try:
            return answer(image)
        except ValueError as error:  # for example, the picture is too small
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title=f'ConvNeur: {name}') as page:
        gr.Markdown(f'## ConvNeur: {name}\nUpload a picture: its prediction appears beside it, and below what the '
                    'global branches do with it. The symbols in its corner enlarge and save the sheet.')
        with gr.Row():
            picture = gr.Image(label='Picture', type='numpy', image_mode='RGB', sources=['upload', 'clipboard'])
            prediction = gr.Image(label='Prediction', **shown)
        button = gr.Button('Predict', variant='primary')
        sheet = gr.Image(label='Gate sheet', **shown)
        # One request at a time, because the model's parts are recorded while it runs.
        gr.on([button.click, picture.upload], reply, picture, [prediction, sheet], concurrency_limit=1)
    return page


if __name__ == '__main__':
    launch.run(main)
