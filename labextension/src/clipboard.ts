/** The clipboard, where the page has one and may use it. */

/** Copy a text; whether that was allowed. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    return false // not a secure page, or not allowed
  }
}
