// Sliders move the edge between photo and render; a button fills its frame with the splats.
for (const slider of document.querySelectorAll("input[type=range]"))
  slider.addEventListener("input", () =>
    slider.previousElementSibling.style.setProperty("--at", slider.value + "%"));
for (const button of document.querySelectorAll("button[data-splats]"))
  button.addEventListener("click", () => {
    const frame = document.createElement("iframe");
    frame.title = "The splats";
    frame.srcdoc = JSON.parse(document.getElementById(button.dataset.splats).textContent);
    button.replaceWith(frame);
  });
