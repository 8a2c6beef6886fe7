"""What is written beside a built model as it stands here, but for the model's names: CMake files and callers."""
