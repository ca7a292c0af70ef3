"""Show moments to people: a web page, files cut from the video, and the parts that all timelines share."""
