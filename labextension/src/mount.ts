/**
 * A view's place in the page.
 *
 * What a notebook keeps is static HTML; the live view stands over it while there is a kernel. The HTML
 * carries the view's key, so that the view finds it in whatever output area shows it now, also after the
 * page was loaded again or the output was drawn anew: then the same elements move to the new place.
 */

import { h } from './dom'
import { BASE_CSS } from './theme'

const ATTRIBUTE = 'data-llm-magic'

/** An element for one view in a shadow root, where the host's styles and shortcuts do not reach. */
export function makeHost(): { host: HTMLElement; root: HTMLElement } {
  const root = h('div', { class: 'llm' })
  // Lumino, under JupyterLab, looks for this attribute before it takes a key as a notebook's shortcut.
  const host = h('div', { class: 'llm-magic-live', 'data-lm-suppress-shortcuts': 'true' })
  host.attachShadow({ mode: 'open' }).append(h('style', {}, BASE_CSS), root)
  return { host, root }
}

/** Keeps the live views of one kernel in their places while the page changes. */
export class Mounts {
  private readonly hosts = new Map<string, HTMLElement>()
  private readonly observer: MutationObserver

  /** `found` is called with the key of a place whose view is not here yet. */
  constructor(
    private readonly prefix: string,
    private readonly found: (view: string) => void,
  ) {
    this.observer = new MutationObserver(records => {
      if (records.some(record => record.addedNodes.length)) this.settle()
    })
    this.observer.observe(document.body, { childList: true, subtree: true })
  }

  /** Show `host` wherever the page has a place for this view, now or later. */
  add(view: string, host: HTMLElement): void {
    this.hosts.set(view, host)
    this.settle()
  }

  /** Whether the view is somewhere in the page. */
  isShown(view: string): boolean {
    return this.hosts.get(view)?.isConnected ?? false
  }

  /** Show what the notebook holds again. */
  remove(view: string): void {
    const host = this.hosts.get(view)
    this.hosts.delete(view)
    if (host?.parentElement) reveal(host.parentElement, host)
  }

  dispose(): void {
    this.observer.disconnect()
    for (const view of [...this.hosts.keys()]) this.remove(view)
  }

  private settle(): void {
    for (const place of document.querySelectorAll<HTMLElement>(`[${ATTRIBUTE}^="${this.prefix}/"]`)) {
      const view = place.getAttribute(ATTRIBUTE)?.slice(this.prefix.length + 1) ?? ''
      const host = this.hosts.get(view)
      if (!host) this.found(view)
      else if (!host.isConnected || isNewer(place, host)) cover(place, host)
    }
  }
}

/** Whether a place came into the page while the host still stands in one that is about to go. */
function isNewer(place: HTMLElement, host: HTMLElement): boolean {
  return host.parentElement !== place && !host.parentElement?.isConnected
}

function cover(place: HTMLElement, host: HTMLElement): void {
  const scrolled = [...(host.shadowRoot?.querySelectorAll<HTMLElement>('[data-scrolls]') ?? [])].map(
    element => [element, element.scrollTop] as const,
  )
  const focused = host.shadowRoot?.activeElement
  for (const child of place.children) if (child !== host && child instanceof HTMLElement) child.hidden = true
  place.append(host)
  for (const [element, top] of scrolled) element.scrollTop = top
  if (focused instanceof HTMLElement) focused.focus({ preventScroll: true })
}

function reveal(place: HTMLElement, host: HTMLElement): void {
  host.remove()
  for (const child of place.children) if (child instanceof HTMLElement) child.hidden = false
}
