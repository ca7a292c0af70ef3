"""What visitors may ask for. Apart from the page, so that `diffusionvmr app --help` does not load Gradio."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """
    What visitors may ask for.

    Args:
        max_video_seconds: maximum duration of a video.
        max_encoding_seconds: maximum time that decoding and encoding one video may take.
        max_upload_bytes: maximum size of a video, uploaded or downloaded.
        concurrency: number of searches at the same time. Other visitors wait in a queue.
        max_waiting: maximum length of the queue.
        keep_seconds: videos and other files are deleted when they have not been used for this long.
    """

    max_video_seconds: float = 3600.0
    max_encoding_seconds: float = 1800.0
    max_upload_bytes: int = 500 * 2**20
    concurrency: int = 1
    max_waiting: int = 100
    keep_seconds: int = 3600

    @property
    def max_folder_bytes(self) -> int:
        """No more videos are accepted, and no downloads made, while the files of all visitors take more than this."""
        return 20 * self.max_upload_bytes
