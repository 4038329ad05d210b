"""The models, their recipes and their checkpoints; installs as nystromgan.zoo."""

from nystromgan.zoo.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from nystromgan.zoo.registry import create_model, list_models

__all__ = ["create_model", "list_checkpoints", "list_models", "load_checkpoint", "save_checkpoint"]
