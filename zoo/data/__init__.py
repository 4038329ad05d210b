"""Where real data come from: one file a source."""

# What a recipe's [data] source may be, and the class that serves it; other keys of [data] are its keywords.
SOURCES = {
    "moving_mnist": "nystromgan.zoo.data.moving_mnist:MovingMNIST",
    "tiff_stacks": "nystromgan.zoo.data.tiff_stacks:TiffStacks",
    "video_folder": "nystromgan.zoo.data.video_folder:VideoFolder",
}
