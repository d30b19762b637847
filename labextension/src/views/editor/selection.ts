/** Which blocks are chosen, by label; ranges run from the anchor over the list that one is in. */
export class Selection {
  private chosen = new Set<string>()
  private anchor = ''

  get labels(): ReadonlySet<string> {
    return this.chosen
  }

  has(label: string): boolean {
    return this.chosen.has(label)
  }

  /** Only this one. */
  only(label: string): void {
    this.chosen = new Set([label])
    this.anchor = label
  }

  toggle(label: string): void {
    if (!this.chosen.delete(label)) this.chosen.add(label)
    this.anchor = label
  }

  /** All from the anchor to this one, in the order of `list`. */
  extend(label: string, list: string[]): void {
    const start = list.indexOf(this.anchor)
    if (start < 0) {
      this.only(label)
      return
    }
    const [from, to] = [start, list.indexOf(label)].sort((a, b) => a - b)
    this.chosen = new Set(list.slice(from, (to ?? 0) + 1))
  }

  all(list: string[]): void {
    this.chosen = new Set(list)
    this.anchor = list[0] ?? ''
  }

  clear(): void {
    this.chosen.clear()
    this.anchor = ''
  }

  /** Forget what is not there any more. */
  keep(labels: Iterable<string>): void {
    const there = new Set(labels)
    for (const label of this.chosen) if (!there.has(label)) this.chosen.delete(label)
  }
}
