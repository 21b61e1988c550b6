#!/usr/bin/env python
"""Check a data set before training: decode every image and compare it with its annotation.

    tools/check_dataset.py coco data/coco/annotations/instances_train2017.json data/coco/train2017
    tools/check_dataset.py ade20k data/ade/ADEChallengeData2016/images/training \\
        data/ade/ADEChallengeData2016/annotations/training
    tools/check_dataset.py imagenet data/imagenet/train
    tools/check_dataset.py imagenet data/imagenet/val --ann-file data/imagenet/meta/val.txt

The exit code is 0 if there are no faults, 1 if there are, and 2 if the check cannot be made.
"""
import argparse
import sys
from concurrent.futures.process import BrokenProcessPool

if __name__ == '__main__':
    from _environment import prepare
    prepare()

from convneur_mm.datasets.check import Report, check_ade20k, check_coco, check_imagenet
from convneur_mm.engine.files.errors import one_line_errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--workers', type=int, metavar='N',
                        help='number of processes that decode images (default: one per core)')
    common.add_argument('--max-shown', type=count, default=10, metavar='N',
                        help='maximum number of faults to show; the others are counted (default: %(default)s)')
    forms = parser.add_subparsers(dest='form', required=True, metavar='FORM')
    coco = forms.add_parser('coco', parents=[common], help='COCO instances')
    coco.add_argument('ann_file', metavar='ANN_FILE', help='annotation file, instances_*.json')
    coco.add_argument('image_dir', metavar='IMAGE_DIR', help='folder that the file names in ANN_FILE are relative to')
    ade20k = forms.add_parser('ade20k', parents=[common], help='images, each with a label map of the same name')
    ade20k.add_argument('image_dir', metavar='IMAGE_DIR', help='folder of the images of a split')
    ade20k.add_argument('label_dir', metavar='LABEL_DIR', help='folder of the label maps of the split')
    ade20k.add_argument('--num-classes', type=int, default=150, metavar='N',
                        help='number of classes; label maps hold 1 to N, 0 for no class, 255 for ignored pixels '
                        '(default: %(default)s)')
    ade20k.add_argument('--keep-zero-label', action='store_true',
                        help='expect 0 to N - 1 in label maps, as for a data set with reduce_zero_label=False')
    ade20k.add_argument('--image-suffix', default='.jpg', metavar='END',
                        help='suffix of image file names (default: %(default)s)')
    ade20k.add_argument('--label-suffix', default='.png', metavar='END',
                        help='suffix of label map file names (default: %(default)s)')
    imagenet = forms.add_parser('imagenet', parents=[common], help='one folder per class, or a list of labels')
    imagenet.add_argument('folder', metavar='FOLDER', help='folder with the class folders or all images of a split')
    imagenet.add_argument('--ann-file', metavar='FILE',
                          help='list with one line "name label" per image, instead of class folders')
    imagenet.add_argument('--num-classes', type=int, metavar='N',
                          help='number of classes of the model, which the data set must match (default: any)')
    return parser.parse_args(argv)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be an integer of 0 or more, got {text!r}')
    return int(text)


def check(args: argparse.Namespace) -> Report:
    if args.form == 'coco':
        return check_coco(args.ann_file, args.image_dir, workers=args.workers)
    if args.form == 'ade20k':
        return check_ade20k(args.image_dir, args.label_dir, args.num_classes, args.image_suffix, args.label_suffix,
                            workers=args.workers, reduce_zero_label=not args.keep_zero_label)
    return check_imagenet(args.folder, workers=args.workers, ann_file=args.ann_file, num_classes=args.num_classes)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with one_line_errors():
        try:
            report = check(args)
        except BrokenProcessPool:
            raise OSError('a worker process died, most likely for lack of memory: try a smaller --workers') from None
        except KeyboardInterrupt:
            return 130
    print(report.text(args.max_shown))
    return 0 if report.clean else 1


if __name__ == '__main__':
    sys.exit(main())
