"""Messages of libraries that are untrue here or repeat in every run, silenced."""

from __future__ import annotations

import logging
import warnings

log = logging.getLogger(__name__)

LEVELS = {
    "ekd_lightning.progress_lines": logging.INFO,  # even in commands that log warnings only
    "pytorch_lightning.utilities.rank_zero": logging.WARNING,
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
    "hydra_plugins": logging.WARNING,  # the sweep's own lines name its jobs
    "hydra._internal.core_plugins": logging.WARNING,
    # PyTorch logs at exit, if Ctrl-C came before it had set its own levels.
    "torch._subclasses.fake_tensor": logging.WARNING,
    "torch.utils.cpp_extension": logging.ERROR,  # CUDA may be missing
}


class _HubRetries(logging.Filter):
    """Tells once that a request to the Hugging Face hub has failed, in place of four lines for each try."""

    _told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of the hub's client is about something else."""
        cause, sign, _ = record.getMessage().partition(" thrown while requesting ")
        if sign and not self._told and log.isEnabledFor(logging.WARNING):  # not within a check of settings
            self._told = True
            log.warning("a request to the Hugging Face hub failed (%s); trying again", cause)
        return not (self._told and (sign or cause.startswith(("Retrying in ", "Rate limited. Waiting "))))


_HUB_RETRIES = _HubRetries()


def quiet_libraries() -> None:
    """Silences messages of libraries that are untrue here or repeat in every run."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_HUB_RETRIES)
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",  # there are none: images are in memory
        ".*module.* in eval mode.*",  # the teachers, on purpose
        ".*isinstance.treespec, LeafSpec.*",
        ".*Total length of .* across ranks is zero.*",  # a teacher has no validation images
        ".*is smaller than the logging interval.*",  # curves are per epoch
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        "Grad strides do not match bucket view strides.*",  # of 1 x 1 convolutions in channels_last, told by each rank
        ".*srun. command is available.*",  # most runs need none; the number of processes is checked
    ):
        warnings.filterwarnings("ignore", message)
