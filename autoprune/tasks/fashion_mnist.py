"""Fashion-MNIST (Xiao et al. 2017), from the files of Debian's dataset-fashion-mnist."""

from autoprune.tasks.idx import IdxTask

fashion_mnist = IdxTask(
    name="fashion_mnist",
    folder="/usr/share/datasets/fashion-mnist",
    suffix=".gz",
    install="apt-get install dataset-fashion-mnist",
    model="residual_cnn",
    mirrored=True,
)
