
(() => {
  const seen = document.getElementById("seen"), at = 1000 * seen.dataset.at, silent = 1000 * seen.dataset.silent
  const words = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`
  const show = () => {
    const age = Math.max(0, Date.now() - at)
    seen.textContent = age > silent ? `not heard of since ${new Date(at).toLocaleString()}` : `${words(age / 1000)} ago`
    seen.className = age > silent ? "lost" : ""
  }
  show()
  setInterval(show, 5000)
  setTimeout(() => location.reload(), 30000)
})()
