"""How long a job takes on a machine, by the network's arithmetic: docs/instances.md explains it."""

from dataclasses import dataclass

from launch.targets.instance_types import InstanceType
from trainer.settings import config as settings
from trainer.settings.config import Config

# Multiply-adds of a forward pass, in 1e9, of a 224 px picture: torchvision's model pages.
GMACS = {
    "resnet18": 1.81,
    "resnet34": 3.66,
    "resnet50": 4.09,
    "resnet101": 7.80,
    "resnet152": 11.51,
    "wide_resnet50_2": 11.40,
    "mobilenet_v2": 0.30,
    "mobilenet_v3_large": 0.22,
    "mobilenet_v3_small": 0.06,
    "efficientnet_b0": 0.39,
    "convnext_tiny": 4.46,
    "regnet_y_400mf": 0.40,
    "densenet121": 2.83,
    "vgg16": 15.47,
    "vit_b_16": 17.56,
    "swin_t": 4.49,
}

# Measured with ResNet-50 at 224 px on an AMD EPYC core (docs/instances.md): seconds a picture.
CORE_TRAINING, CORE_FORWARD, CORE_HEAD = 0.359, 0.102, 0.00007
MEASURED_GMACS = GMACS["resnet50"]

T4_PEAK = 65e12  # FLOP/s in float16, NVIDIA's data sheet
# Of the peak that convolutions reach in training: an assumption, near what is reported for
# ResNet-50 with mixed precision.
T4_SHARE = 0.15
TRAINING_PASSES = 3  # a backward pass costs two forward ones

# Seconds that a machine is paid for before it trains: it starts, installs, and fetches pictures.
# What users of SageMaker report (4 to 5 minutes, sagemaker-python-sdk#143), and for EC2 an
# assumption. It is what one may expect; what a ceiling allows for is ceiling.AROUND.
START = 300.0

# Of 4 machines training one network, from the bytes of its gradients and 5 Gbit/s
# (docs/instances.md); a frozen backbone sends its head's only. By model.freeze.
EFFICIENCY = {"none": 0.93, "backbone": 0.99}


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run on one kind of machine."""

    before: float  # the first epoch: computing the features of a frozen backbone
    epoch: float

    def run(self, config: Config, images: int) -> float:
        """Return the seconds of all epochs and what comes before. images: of training."""
        return self.before + settings.epochs_for(config.train, images) * self.epoch


def estimate(machine: InstanceType, config: Config, images: int) -> Estimate | None:
    """Return the seconds by the network's arithmetic, None where that is not known.

    images: of training.
    """
    if config.model.name not in GMACS:
        return None
    size = GMACS[config.model.name] * (pixels(config) / 224) ** 2
    if machine.gpu:
        forward = 2e9 * size / (T4_PEAK * T4_SHARE)
        training = TRAINING_PASSES * forward
    else:
        share = size / MEASURED_GMACS / machine.vcpus
        training, forward = CORE_TRAINING * share, CORE_FORWARD * share
    speed = 1.0
    if machine.count > 1:
        speed = machine.count * EFFICIENCY[config.model.freeze]
    if config.model.freeze == "none":
        return Estimate(0.0, images * training / speed)
    if config.model.cached_views is None:
        return Estimate(0.0, images * forward / speed)
    views = min(config.model.cached_views, settings.epochs_for(config.train, images))
    return Estimate(images * views * forward / speed, images * CORE_HEAD / machine.vcpus)


def pixels(config: Config) -> int:
    """Return the side of an image.

    By default it is what the weights expect, for all networks of the table this.
    """
    return config.data.size or settings.PLAIN.size
