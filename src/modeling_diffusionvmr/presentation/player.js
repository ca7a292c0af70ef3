// Play the moments of a timeline: `root` contains it, and `findVideo` returns the video, which may change.
function playMoments(root, findVideo) {
  let moment = null;  // what is playing: start and end in seconds

  function choose(chosen) {
    moment = chosen;
    for (const button of root.querySelectorAll("[data-start]")) {
      const {start, end} = timesOf(button);
      button.classList.toggle("playing", moment !== null && start === moment.start && end === moment.end);
    }
  }

  function timesOf(button) {
    return {start: Number(button.dataset.start), end: Number(button.dataset.end)};
  }

  function update() {
    const video = findVideo();
    if (!video) return;
    const timeline = root.querySelector("#timeline");
    if (timeline && video.duration) {
      const share = Math.min(100, 100 * video.currentTime / Number(timeline.dataset.duration));
      for (const line of root.querySelectorAll(".now")) line.style.left = share + "%";
    }
    if (moment && !video.seeking && video.currentTime >= moment.end) {
      video.pause();
      choose(null);
    }
  }

  function follow() {
    const video = findVideo();
    update();
    if (video && !video.paused) requestAnimationFrame(follow);
  }

  root.addEventListener("click", (event) => {
    const button = event.target.closest("[data-start]");
    const video = findVideo();
    if (!button || !video) return;
    choose(timesOf(button));
    video.currentTime = moment.start;
    video.scrollIntoView({block: "nearest"});  // on a phone, it may be out of sight
    const playing = video.play();
    if (playing) playing.catch(() => {});  // the event "error" says why
  });

  // Media events do not bubble, but the document can capture them
  function on(name, listener) {
    document.addEventListener(name, (event) => {
      if (event.target === findVideo()) listener(event.target);
    }, true);
  }
  on("play", follow);
  on("timeupdate", update);  // also in a background tab
  on("ended", () => choose(null));
  on("seeking", (video) => {
    // The viewer moves on: do not stop at the end of the moment any more
    if (moment && (video.currentTime < moment.start - 0.1 || video.currentTime > moment.end)) choose(null);
  });
}
