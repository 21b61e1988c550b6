"""Code that hides the OpenMMLab packages and OpenCV from a Python process."""
# Put before a program's own code, it does what an environment without these packages does.
WITHOUT_OPENMMLAB = """
import importlib.util, sys
HIDDEN = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'cv2')
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in HIDDEN:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hide())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split('.')[0] in HIDDEN else find_spec(name, *args)
"""
