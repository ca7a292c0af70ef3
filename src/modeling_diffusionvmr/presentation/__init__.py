"""Show moments to people: a web page, files cut from the video, and what pictures of a timeline have in common."""
