"""Save models in a folder or on Hugging Face's hub, and load them from there; timm loads the same folders.

It needs huggingface_hub and safetensors, which are optional.
"""
from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

if importlib.util.find_spec('huggingface_hub'):
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
else:
    class PyTorchModelHubMixin:
        """Stand-in whose methods say what to install."""

        def __init_subclass__(cls, **card: object) -> None:
            super().__init_subclass__()

        @classmethod
        def from_pretrained(cls, *args: object, **options: object) -> NoReturn:
            raise ImportError('loading from the hub needs huggingface_hub: pip install huggingface_hub safetensors')

        def save_pretrained(self, *args: object, **options: object) -> NoReturn:
            raise ImportError('saving for the hub needs huggingface_hub: pip install huggingface_hub safetensors')

        push_to_hub = save_pretrained

WEIGHTS = 'model.safetensors'
# What timm knows of a model besides its architecture.
TIMM_CFG = dict(
    input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bicubic', mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225), first_conv='downsample_layers.0.0', classifier='head.fc')
CARD = """---
{{ card_data }}
---

# ConvNeur

```python
from convneur_mm.models import ConvNeur
backbone = ConvNeur.from_pretrained('FOLDER_OR_REPOSITORY')
```

```python
import timm
import convneur_mm.timm
model = timm.create_model('hf-hub:REPOSITORY', pretrained=True, features_only=True)  # local-dir:FOLDER for a folder
```

Saved by the package convneur_mm. ConvNeur is from "Efficiency Follows Global-Local Decoupling" (CVPR 2026).
"""


class HubModel(PyTorchModelHubMixin):
    """A backbone with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``, those of huggingface_hub.

    A subclass describes how it is built in :meth:`hub_config`.
    """

    def hub_config(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: the arguments of the class, and timm's description of the model."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *, config: dict | None = None, **options: Any,
                        ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card to a folder.

        Args:
            save_directory (str | PathLike): The folder, created if missing.
            config (dict | None): Another content of ``config.json``. Defaults to None, for :meth:`hub_config`.
            **options: See ``PyTorchModelHubMixin.save_pretrained``.
        """
        return super().save_pretrained(save_directory, config=config or self.hub_config(), **options)

    def push_to_hub(self, repo_id: str, *, config: dict | None = None, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; see ``PyTorchModelHubMixin.push_to_hub``."""
        return super().push_to_hub(repo_id, config=config or self.hub_config(), **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, cache_dir: str | os.PathLike | None,
                         force_download: bool, local_files_only: bool, token: str | bool | None,
                         map_location: str = 'cpu', strict: bool = True, **options: Any) -> HubModel:
        """Build the model and load its weights; with ``strict`` all of its weights must be in the file.

        Raises:
            RuntimeError: If weights are missing or of another shape.
        """
        from safetensors.torch import load_file
        file = os.path.join(model_id, WEIGHTS) if os.path.isdir(model_id) else hf_hub_download(
            model_id, WEIGHTS, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
            local_files_only=local_files_only)
        if not Path(file).is_file():
            raise FileNotFoundError(f'{model_id} has no {WEIGHTS}: expected a folder that save_pretrained wrote')
        weights, model = load_file(file), cls(**options)
        # The file may also hold a classifier's head, and norms of stages that this model does not return.
        own = model.state_dict()
        model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=strict)
        return model.to(map_location).eval()


def without_unused_norms(weights: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Return a backbone's weights for timm's model, which has no norms after the first three stages."""
    return {name: value for name, value in weights.items() if not name.startswith(('norm0.', 'norm1.', 'norm2.'))}
