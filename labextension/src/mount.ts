/**
 * A view's place in the page.
 *
 * What a notebook keeps is static HTML; the live view stands over it while there is a kernel. The HTML
 * carries the view's key, so that the view finds it in whatever output area shows it now, also after the
 * page was loaded again or the output was drawn anew: then the same elements move to the new place.
 */

import { h } from './dom'
import { Kept } from './kept'
import { BASE_CSS } from './theme'

const ATTRIBUTE = 'data-llm-magic'
/** An output that is drawn anew is away for a moment. */
const AWAY_AT_MOST_MS = 1000

/** An element for one view in a shadow root, where the host's styles and shortcuts do not reach. */
export function makeHost(): { host: HTMLElement; root: HTMLElement } {
  const root = h('div', { class: 'llm' })
  // Lumino, under JupyterLab, looks for this attribute before it takes a key as a notebook's shortcut.
  const host = h('div', { class: 'llm-magic-live', 'data-lm-suppress-shortcuts': 'true' })
  host.attachShadow({ mode: 'open' }).append(h('style', {}, BASE_CSS), root)
  return { host, root }
}

/** What the page tells about places, by the key of their view. */
export interface Watcher {
  /** A place whose view is not here yet. */
  found: (view: string) => void
  /** A view is in the page, for the first time or again. */
  covered: (view: string) => void
}

/** Keeps the live views of one kernel in their places while the page changes. */
export class Mounts {
  private readonly hosts = new Map<string, { host: HTMLElement; kept: Kept | null }>()
  /** Views that were taken out of the page. */
  private readonly away = new Set<string>()
  private readonly observer: MutationObserver
  private gone: (() => void) | null = null
  private timer: ReturnType<typeof setTimeout> | undefined

  constructor(
    private readonly prefix: string,
    private readonly watcher: Watcher,
  ) {
    this.observer = new MutationObserver(records => this.changed(records))
    this.watch()
    this.settle()
  }

  /** Show `host` wherever the page has a place for this view, now or later. */
  add(view: string, host: HTMLElement): void {
    this.gone = null
    this.watch()
    this.hosts.set(view, { host, kept: host.shadowRoot && new Kept(host, host.shadowRoot) })
    this.settle()
  }

  /** Whether the view is somewhere in the page. */
  isShown(view: string): boolean {
    return this.hosts.get(view)?.host.isConnected ?? false
  }

  /** Whether the page has a place for the view. */
  hasPlace(view: string): boolean {
    return [...this.places()].some(place => this.viewOf(place) === view)
  }

  /** Show what the notebook holds again. */
  remove(view: string): void {
    const host = this.hosts.get(view)?.host
    this.hosts.delete(view)
    this.away.delete(view)
    if (host?.parentElement) reveal(host.parentElement, host)
  }

  /** Let views stand as long as the page has one of them, and call `gone` then. */
  retire(gone: () => void): void {
    this.gone = gone
    this.endIfGone()
  }

  dispose(): void {
    clearTimeout(this.timer)
    this.observer.disconnect()
    for (const view of [...this.hosts.keys()]) this.remove(view)
  }

  /** Put the views into the places that there are. */
  settle(): void {
    for (const place of this.places()) {
      const view = this.viewOf(place)
      const host = this.hosts.get(view)?.host
      if (!host) this.watcher.found(view)
      else if (!host.isConnected) {
        cover(place, host)
        this.away.add(view)
      }
    }
    for (const view of [...this.away]) if (this.isShown(view)) this.back(view)
  }

  private back(view: string): void {
    this.away.delete(view)
    this.hosts.get(view)?.kept?.restore()
    this.watcher.covered(view)
  }

  private watch(): void {
    this.observer.observe(document.body, { childList: true, subtree: true })
  }

  private changed(records: MutationRecord[]): void {
    const removed = records.flatMap(record => [...record.removedNodes]).filter(node => node instanceof Element)
    for (const [view, { host }] of this.hosts) if (removed.some(node => node.contains(host))) this.away.add(view)
    if (this.away.size || records.some(record => record.addedNodes.length)) this.settle()
    this.endIfGone()
  }

  /** Nothing is shown and nothing will be: nothing is to be watched either. */
  private endIfGone(): void {
    if (!this.gone || this.isAnyShown()) return
    clearTimeout(this.timer)
    this.timer = setTimeout(() => {
      const { gone } = this
      if (!gone || this.isAnyShown()) return
      this.gone = null
      gone()
    }, AWAY_AT_MOST_MS)
  }

  private isAnyShown(): boolean {
    return [...this.hosts.values()].some(({ host }) => host.isConnected)
  }

  private places(): NodeListOf<HTMLElement> {
    return document.querySelectorAll<HTMLElement>(`[${ATTRIBUTE}^="${this.prefix}/"]`)
  }

  private viewOf(place: HTMLElement): string {
    return place.getAttribute(ATTRIBUTE)?.slice(this.prefix.length + 1) ?? ''
  }
}

function cover(place: HTMLElement, host: HTMLElement): void {
  for (const child of place.children) if (child !== host && child instanceof HTMLElement) child.hidden = true
  place.append(host)
}

function reveal(place: HTMLElement, host: HTMLElement): void {
  host.remove()
  for (const child of place.children) if (child instanceof HTMLElement) child.hidden = false
}
