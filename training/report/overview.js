
(() => {
  const table = document.getElementById("runs")
  if (!table) return
  const body = table.tBodies[0], rows = [...body.rows], filter = document.getElementById("filter")
  const words = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min`
    : s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`
  const seen = rows.map(row => row.cells[row.cells.length - 2])
  const ages = () => seen.forEach(cell => {
    const age = Math.max(0, Date.now() / 1000 - cell.dataset.sort), lost = cell.dataset.silent && age > cell.dataset.silent
    cell.textContent = (lost ? "not heard of for " : "") + words(age) + (lost ? "" : " ago")
    cell.className = lost ? "lost" : ""
  })
  const value = cell => cell.dataset.sort !== undefined ? +cell.dataset.sort : cell.textContent.trim()
  // What was chosen stays when the page is loaded anew.
  let [column, down, wanted] = [-1, false, ""]
  try { [column, down, wanted] = JSON.parse(decodeURIComponent(location.hash.slice(1))) } catch {}
  const show = () => {
    filter.value = wanted
    const asked = wanted.toLowerCase().split(/\s+/)
    rows.forEach(row => { row.hidden = !asked.every(word => row.textContent.toLowerCase().includes(word)) })
    document.getElementById("count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`
    const order = [...rows]
    if (column >= 0) order.sort((one, other) => {
      const [a, b] = [value(one.cells[column]), value(other.cells[column])]
      return (down ? -1 : 1) * (typeof a === "number" && typeof b === "number" ? a - b : `${a}`.localeCompare(`${b}`))
    })
    body.append(...order)
    if (column >= 0 || wanted) history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify([column, down, wanted])))
  }
  filter.addEventListener("input", () => { wanted = filter.value; show() })
  ;[...table.tHead.rows[0].cells].forEach((cell, place) => cell.firstElementChild.addEventListener("click", () => {
    [column, down] = [place, column === place && !down]
    show()
  }))
  ages()
  show()
  setInterval(ages, 5000)
  setTimeout(() => location.reload(), 60000)
})()
