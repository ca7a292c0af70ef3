"""The web page of `diffusionvmr app`, and its programming interface."""

import os

# Gradio reads these when it is imported: send no statistics, and do not look for newer versions
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
